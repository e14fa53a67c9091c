"""The README's commands, as a user types them, on the bundled data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mosaicbert.cli import main

ROOT = Path(__file__).parents[2]
MODELS = ("hf_bert", "mosaic_bert")


def command(*words, cwd, ok=True, **environ):
    """Run a script of the repository, or `mosaicbert`, in `cwd`."""
    program = [str(ROOT / words[0])] if words[0].endswith(".py") else ["-m", "mosaicbert", words[0]]
    done = subprocess.run(
        [sys.executable, *program, *map(str, words[1:])],
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "80",
            **environ,
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if ok:
        assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the converted sample, as the README makes it."""
    home = tmp_path_factory.mktemp("home")
    words = "convert --dataset sample --out_root ./my-copy-c4 --splits train_small val"
    command(*words.split(), cwd=home)
    return home


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("model", MODELS)
def test_pretraining(home, model):
    run = f"pretrain-{model}"
    done = command(
        *("main.py", ROOT / "yamls/test/main.yaml", f"model.name={model}", f"run_name={run}"),
        *("save_folder=ckpt/{run_name}", "eval_subset_num_batches=2"),
        cwd=home,
    )
    assert "metrics/eval/loss" in done.stdout
    rows = rows_of(home / "runs" / run)
    losses = [row["loss/train/total"] for row in rows if "loss/train/total" in row]
    assert len(losses) == 10
    assert 9.5 < losses[-1] < losses[0] < 11  # about ln(vocabulary), and falling
    checkpoint = home / "ckpt" / run / (home / "ckpt" / run / "latest").read_text().strip()
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["num_hidden_layers"] == 2


def test_two_ranks_make_the_losses_of_one(home):
    def losses(run, *more):
        words = (ROOT / "yamls/test/main.yaml", f"run_name={run}", "model.name=mosaic_bert")
        shape = ("model.model_config.hidden_dropout_prob=0", "max_duration=3ba")
        command("pretrain", *words, *shape, "eval_subset_num_batches=1", *more, cwd=home)
        rows = rows_of(home / "runs" / run)
        return [row["loss/train/total"] for row in rows if "loss/train/total" in row]

    assert losses("two", "--nproc", "2") == pytest.approx(losses("one"), rel=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_sequence_classification_from_a_checkpoint(home, model):
    run = f"classify-{model}"
    done = command(
        *("sequence_classification.py", ROOT / "yamls/test/sequence_classification.yaml"),
        *(f"model.name={model}", f"run_name={run}", f"load_path=ckpt/pretrain-{model}"),
        *("max_duration=4ba", "eval_interval=4ba", "eval_subset_num_batches=4"),
        cwd=home,
    )
    assert "metrics/eval/accuracy" in done.stdout


def test_glue_runs_its_jobs_once(home):
    words = ("glue.py", ROOT / "yamls/test/glue.yaml", "model.name=mosaic_bert", "base_run_name=g")
    first = command(*words, cwd=home)
    assert "mean of 2 of 8 tasks" in first.stdout
    content = json.loads((home / "runs/g/glue.json").read_text())
    assert "GLUE: mean of each task" in (home / "runs/g/report.html").read_text()
    assert content["num_tasks"] == 2
    assert (home / "local-finetune-checkpoints/g/task=mnli/seed=19/latest").exists()
    assert not (home / "local-finetune-checkpoints/g/task=rte").exists()
    again = command(*words, cwd=home)
    assert "3 of 3 jobs were finished before" in again.stderr
    assert again.stdout == first.stdout


def test_inspect_and_its_streaming_form(home):
    done = command(
        *("inspect", "--local_path", "my-copy-c4", "--tokenizer", "bert-base-uncased"), cwd=home
    )
    assert "108" in done.stdout
    command(
        *("inspect", "--local_path", "cache-c4", "--remote_path", "my-copy-c4"),
        *("--tokenizer", "bert-base-uncased", "--split", "val"),
        cwd=home,
    )
    assert (home / "cache-c4/val/index.json").exists()


MAIN = str(ROOT / "yamls/test/main.yaml")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretrain", "gone.yaml"], "There is no configuration file gone.yaml"),
        (["pretrain", MAIN, "train_loader.dataset.shufle=1"], 'Did you mean "shuffle"?'),
        (["pretrain", MAIN, "data_local=nowhere"], "nowhere"),
        (["pretrain", MAIN, "train_loader.dataset.split=trian"], "Splits there: train_small, val"),
        (["pretrain", MAIN, "model.name=bert"], "must be 'hf_bert', 'mosaic_bert'"),
        (["pretrain", MAIN, "model.model_config.num_attention_heads=3"], "128 does not divide"),
        (
            ["pretrain", MAIN, "model.model_config.num_hidden_layers=two"],
            "model.model_config.num_hidden_layers: 'two' is not allowed: must be of the kind int",
        ),
        (
            ["pretrain", MAIN, "model.name=mosaic_bert", "model.model_config.attention_window=1.5"],
            "model_config.attention_window: 1.5 is not allowed: must be of the kind int or null",
        ),
        (["pretrain", MAIN, "load_path=nothing-here"], "nothing-here"),
        (
            ["pretrain", MAIN, "model.pretrained_checkpoint=gone.pt"],
            "model.pretrained_checkpoint: gone.pt does not exist",
        ),
        (
            ["pretrain", MAIN, "load_path=gone", "load_weights_only=true"],
            "load_path: gone does not exist",
        ),
        (["pretrain", MAIN, "save_folder=my-copy-c4/val/index.json/x"], "index.json is a file"),
        (["pretrain", MAIN, "data_remote=nosuch://x", "data_local=x"], "Write s3://, gs://"),
        (["bench", MAIN, "--steps", "0"], "--steps 0: there must be at least 1"),
        (["glue", str(ROOT / "yamls/test/glue.yaml"), "tasks.rt={}"], 'Did you mean "rte"?'),
        (["convert", "--dataset", "gone", "--out_root", "x"], "gone"),
        (["convret"], 'Did you mean "convert"?'),
    ],
    ids=lambda value: (
        "-".join(value[:1] + value[2:3]).replace("/", ".")[-40:] if isinstance(value, list) else ""
    ),
)
def test_mistakes_are_told_in_a_paragraph(home, words, said, monkeypatch, capfd):
    """In this process, to spare the imports of a new one."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = sorted(path.name for path in home.iterdir())
    assert main(words) == 2
    assert said in capfd.readouterr().err
    assert sorted(path.name for path in home.iterdir()) == before


def test_a_batch_that_the_ranks_cannot_share(home):
    done = command("pretrain", MAIN, "--nproc", "3", cwd=home, ok=False)
    assert done.returncode == 2
    assert done.stderr.count("not divisible by the 3 ranks") == 1  # told once, not once a rank


def test_a_checkpoint_of_another_shape_lists_what_differs(home, monkeypatch, capfd):
    monkeypatch.chdir(home)
    yaml = str(ROOT / "yamls/test/sequence_classification.yaml")
    start = ["model.name=mosaic_bert", "load_path=ckpt/pretrain-mosaic_bert", "run_name=other"]
    assert main(["classify", yaml, *start, "model.model_config.hidden_size=64"]) == 2
    said = capfd.readouterr().err
    assert "bert.encoder.layer.0" in said
    assert "128" in said
    assert not (home / "runs/other").exists()


def test_help_is_quick_and_names_every_command():
    """Start-up loads neither torch nor transformers."""
    code = (
        "import sys; from mosaicbert.cli import main; main(['--help']); "
        "print(sorted({'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.rstrip().endswith("[]")
    for name in ("convert", "pretrain", "classify", "glue", "inspect"):
        assert f"  {name} " in done.stdout
