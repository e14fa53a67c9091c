"""From a GLUE YAML to jobs, and back from what earlier calls finished."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from mosaicbert.config import GlueConfig, check, load_config
from mosaicbert.duration import Progress
from mosaicbert.errors import ConfigError
from mosaicbert.glue_suite import jobs as glue_jobs
from mosaicbert.glue_suite.claims import claim_folder, has_checkpoint
from mosaicbert.glue_suite.jobs import finished_result
from mosaicbert.glue_suite.live import LiveTable
from mosaicbert.glue_suite.planning import longest_first, plan_jobs
from mosaicbert.glue_suite.results import JobResult
from mosaicbert.glue_suite.workers import jobs_that_fit, slots
from mosaicbert.train.store import SaveFolder

ROOT = Path(__file__).parents[2]
FULL = ROOT / "yamls/finetuning/glue/mosaic-bert-base-uncased.yaml"


def make(tmp_path, tasks, **more):
    values = {
        "base_run_name": "g",
        "run_folder": str(tmp_path / "{run_name}"),
        "model": {"name": "mosaic_bert"},
        "data_dir": "sample",
        "tasks": tasks,
    }
    return check(GlueConfig, values | more)


def test_the_whole_of_glue_has_the_published_jobs():
    jobs = plan_jobs(load_config(GlueConfig, FULL))
    assert len(jobs) == 1 + 1 + 1 + 3 + 4 + 5 + 5 + 5
    assert jobs[0].task == "mnli"
    cola = next(job for job in jobs if job.task == "cola")
    assert cola.config.max_duration == "10ep"
    assert cola.config.global_train_batch_size == 32
    assert (cola.config.optimizer.lr, cola.config.optimizer.weight_decay) == (5e-5, 5e-6)
    assert cola.config.train_loader.shuffle
    assert cola.config.model.num_labels == 2
    assert not cola.keep_checkpoint
    assert jobs[0].keep_checkpoint


def test_three_tasks_start_from_mnli_of_the_same_seed_order(tmp_path):
    tasks = {"rte": {"seeds": [1, 2, 3]}, "cola": {}, "mnli": {"seeds": [7, 8]}}
    jobs = plan_jobs(make(tmp_path, tasks, starting_checkpoint_load_path="start"))
    by_name = {job.name: job for job in jobs}
    assert [by_name[f"rte-{seed}"].after for seed in (1, 2, 3)] == ["mnli-7", "mnli-8", "mnli-7"]
    assert by_name["rte-2"].config.load_path == by_name["mnli-8"].config.save_folder
    assert by_name["cola-19"].config.load_path == "start"
    assert by_name["cola-19"].after is None


def test_without_mnli_one_warning_says_so(tmp_path, caplog):
    jobs = plan_jobs(make(tmp_path, {"rte": {}, "stsb": {}}, starting_checkpoint_load_path="start"))
    assert {job.config.load_path for job in jobs} == {"start"}
    assert [record.getMessage().count("MNLI is not in this run") for record in caplog.records] == [
        1
    ]
    assert "rte, stsb" in caplog.text


def test_each_tasks_own_settings_win(tmp_path):
    settings = {
        "seeds": [5],
        "lr": 1e-4,
        "batch_size": 8,
        "trainer_kwargs": {"max_duration": "7ba", "eval_subset_num_batches": 2},
    }
    (job,) = plan_jobs(make(tmp_path, {"cola": settings}))
    assert job.config.optimizer.lr == 1e-4
    assert job.config.global_train_batch_size == 8
    assert job.config.max_duration == "7ba"
    assert job.config.eval_subset_num_batches == 2


def test_a_section_of_trainer_kwargs_keeps_its_other_keys(tmp_path):
    wished = {"train_loader": {"shuffle": False}, "optimizer": {"eps": 1e-8}}
    (job,) = plan_jobs(make(tmp_path, {"cola": {"seeds": [5], "trainer_kwargs": wished}}))
    assert (job.config.train_loader.split, job.config.train_loader.shuffle) == ("train", False)
    assert (job.config.optimizer.lr, job.config.optimizer.eps) == (5e-5, 1e-8)


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ({"rt": {}}, 'Did you mean "rte"'),
        ({"rte": {"trainer_kwargs": {"max_duratoin": "1ep"}}}, "tasks.rte.trainer_kwargs"),
        ({"rte": {"trainer_kwargs": {"max_duration": "x"}}}, "must be a time string"),
        ({"rte": {"trainer_kwargs": {"metrics": ["f1"]}}}, "kwargs.metrics: GLUE has its own"),
        ({"rte": {"trainer_kwargs": {"data": {"train": "x"}}}}, "kwargs.data: GLUE has its own"),
        ({"rte": {"seeds": [19, 7, 19]}}, "tasks.rte.seeds: 19 is there more than once"),
    ],
)
def test_mistakes_name_the_task(tmp_path, tasks, said):
    with pytest.raises(ConfigError) as caught:
        plan_jobs(make(tmp_path, tasks))
    assert said in str(caught.value)


def test_a_default_seed_that_a_task_has_already_makes_one_job(tmp_path):
    jobs = plan_jobs(make(tmp_path, {"sst2": {}}, default_seed=717))
    assert [job.seed for job in jobs] == [717, 8364]


def test_a_finished_job_is_known_again_only_if_it_is_the_same(tmp_path):
    (job,) = plan_jobs(make(tmp_path, {"cola": {"seeds": [5]}}))
    assert finished_result(job) is None
    result = JobResult("cola", 5, {"metrics/eval/mcc": 0.5}, 1.5, 10)
    glue_jobs._write_result(job, result)
    assert finished_result(job) == result
    (other,) = plan_jobs(make(tmp_path, {"cola": {"seeds": [5], "lr": 1e-3}}))
    assert finished_result(other) is None
    (job.folder / "result.json").write_text("{")
    with pytest.raises(ConfigError, match=r"result\.json is damaged"):
        finished_result(job)


def test_mnli_runs_again_for_a_changed_job_if_its_checkpoint_is_gone(tmp_path):
    def plan(lr):
        return plan_jobs(make(tmp_path, {"mnli": {}, "rte": {"seeds": [1], "lr": lr}}))

    jobs = plan(1e-5)
    save(jobs[0])
    for job in jobs:
        glue_jobs._write_result(job, JobResult(job.task, job.seed, {}, 1.5, 10))
    assert set(glue_jobs._done_before(plan(2e-5))) == {"mnli-19"}
    glue_jobs._drop_checkpoints(jobs, {job.name: None for job in jobs})
    assert set(glue_jobs._done_before(jobs)) == {"mnli-19", "rte-1"}
    assert glue_jobs._done_before(plan(2e-5)) == {}
    save(jobs[0])  # half-way, and cut off there
    assert glue_jobs._done_before(plan(2e-5)) == {}


def test_a_job_is_another_one_if_what_it_starts_from_is(tmp_path):
    def digests(**mnli):
        found = plan_jobs(make(tmp_path, {"mnli": mnli, "rte": {"seeds": [1]}, "cola": {}}))
        return {job.name: job.digest for job in found}

    before, after = digests(), digests(lr=1e-5)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"mnli-19", "rte-1"}

    def digest():
        (job,) = plan_jobs(
            make(tmp_path, {"mnli": {}}, starting_checkpoint_load_path=str(tmp_path / "ck"))
        )
        return job.digest

    (tmp_path / "ck").mkdir()
    (tmp_path / "ck/latest").write_text("ep0-ba10")
    first = digest()
    assert digest() == first
    (tmp_path / "ck/latest").write_text("ep0-ba20")
    assert digest() != first


def save(job):
    """As the job itself would: the folder claimed, a checkpoint in it."""
    claim_folder(job)
    folder = SaveFolder(job.config.save_folder)
    folder.fs.pipe_file(f"{folder.root}/latest", b"ep0-ba1")
    folder.fs.makedirs(f"{folder.root}/ep0-ba1", exist_ok=True)
    folder.fs.pipe_file(f"{folder.root}/ep0-ba1/state.json", b"{}")
    return folder


def cola_of(tmp_path, keep, lr, **more):
    kwargs = {"save_num_checkpoints_to_keep": keep}
    tasks = {"cola": {"seeds": [1], "lr": lr, "trainer_kwargs": kwargs}}
    return plan_jobs(make(tmp_path, tasks, **more))[0]


@pytest.mark.parametrize("where", [None, "{}/saved", "file://{}/saved", "memory://{}/saved"])
def test_checkpoints_of_other_settings_are_not_gone_on_from(tmp_path, where):
    more = {"save_finetune_checkpoint_folder": where and where.format(tmp_path)}
    job = cola_of(tmp_path, 0, 1e-5, **more)
    folder = save(job)
    claim_folder(job)
    assert has_checkpoint(job)
    kept = cola_of(tmp_path, 1, 2e-5, **more)
    claim_folder(kept)
    assert folder.newest() is None
    save(kept)
    with pytest.raises(ConfigError, match="of a job with other settings"):
        claim_folder(cola_of(tmp_path, 0, 3e-5, **more))
    glue_jobs._drop_checkpoints([job], {job.name: None})
    assert has_checkpoint(kept)
    assert not has_checkpoint(job)
    glue_jobs._drop_checkpoints([kept], {kept.name: None})
    assert has_checkpoint(kept)
    folder.fs.rm_file(f"{folder.root}/job.json")
    with pytest.raises(ConfigError, match="of a job with other settings"):
        claim_folder(job)  # nobody knows whose it is


def test_checkpoints_that_nobody_keeps_go_with_their_folders(tmp_path):
    job = cola_of(tmp_path, 0, 1e-5, save_finetune_checkpoint_prefix=f"{tmp_path}/saved")
    folder = save(job)
    glue_jobs._drop_checkpoints([job], {job.name: None})
    assert list((tmp_path / "saved").iterdir()) == []
    folder.write_note("latest", "ep0-ba1")  # as a kill on the way leaves it
    glue_jobs._drop_checkpoints([job], {job.name: None})
    assert list((tmp_path / "saved").iterdir()) == []


def test_runs_below_one_prefix_have_folders_of_their_own(tmp_path):
    more = {"save_finetune_checkpoint_prefix": f"{tmp_path}/saved/"}
    folders = [
        cola_of(tmp_path, 0, 1e-5, base_run_name=name, **more).config.save_folder
        for name in ("a", "b")
    ]
    assert folders == [f"{tmp_path}/saved/{name}/task=cola/seed=1" for name in ("a", "b")]


def test_plain_lines_where_there_is_no_terminal(capsys):
    job = SimpleNamespace(name="cola-5")
    with LiveTable([job], {}, show=True) as table:
        table.on_event("start", job, None)
        table.on_event("progress", job, {"done": 0.5, "metrics": {"metrics/eval/mcc": 0.25}})
        table.on_event("done", job, JobResult("cola", 5, {"metrics/eval/mcc": 0.5}, 1.5, 10))
        table.on_event("failed", job, "no such file\nmore")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "start  cola-5"
    assert lines[1].startswith("done  cola-5  mcc 0.500")
    assert lines[2].startswith("failed  cola-5  no such file")
    assert len(lines) == 3


def test_progress_counts_in_parts_of_an_epoch(tmp_path):
    (job,) = plan_jobs(make(tmp_path, {"mnli": {}}))
    told = []
    reporter = glue_jobs._Reporter(job.config, 10 * 48 - 7, told.append)
    reporter.log({}, Progress(epoch=1, batch=15, batch_in_epoch=5))
    assert told == [{"done": 0.5, "metrics": {}}]


def test_only_a_checkpoint_that_is_used_again_is_saved_at_the_end(tmp_path):
    keep = {"trainer_kwargs": {"save_num_checkpoints_to_keep": 1}}
    jobs = plan_jobs(make(tmp_path, {"mnli": {}, "rte": {"seeds": [1]}, "cola": keep}))
    saved = {job.task: job.config.save_at_end for job in jobs}
    assert saved == {"mnli": True, "rte": False, "cola": True}
    assert {job.config.save_interval for job in jobs} == {"120sec"}
    (alone,) = plan_jobs(make(tmp_path, {"mnli": {}}))
    assert not alone.config.save_at_end


def test_hf_bert_is_not_compiled_unless_asked(tmp_path):
    def compile_of(name, **more):
        return plan_jobs(make(tmp_path, {"mnli": {}}, model={"name": name}, **more))[
            0
        ].config.compile

    assert compile_of("hf_bert") is False
    assert compile_of("hf_bert", compile=True) is True
    assert compile_of("mosaic_bert") is None


def test_what_others_wait_for_and_long_jobs_start_first(tmp_path):
    tasks = {"mnli": {}, "rte": {"seeds": [1]}, "sst2": {"seeds": [1]}, "cola": {"seeds": [1]}}
    tasks["cola"]["trainer_kwargs"] = {"max_duration": "10ba"}
    jobs = plan_jobs(make(tmp_path, tasks))
    rows = {"mnli": 10, "rte": 2490, "sst2": 67349, "cola": 8551}
    order = [job.task for job in longest_first(jobs, rows)]
    assert order == ["mnli", "sst2", "rte", "cola"]


@pytest.mark.parametrize(
    ("gigabytes", "cores", "found"), [(80, 16, 8), (80, 4, 4), (24, 16, 2), (4, 16, 1)]
)
def test_auto_goes_by_memory_and_cores(tmp_path, gigabytes, cores, found):
    base = {"name": "hf_bert", "pretrained_model_name": "bert-base-uncased"}
    jobs = plan_jobs(make(tmp_path, {"mnli": {}, "rte": {}}, model=base))
    assert jobs_that_fit(jobs, gigabytes * 1e9, cores) == found


def test_a_cpu_gets_a_process_a_core_but_no_idle_ones(tmp_path):
    config = make(tmp_path, {"rte": {"seeds": [1]}}, parallel=True, device="cpu")
    assert slots(config, plan_jobs(config)) == [{"OMP_NUM_THREADS": "1"}]
