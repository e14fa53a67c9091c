import json
import math
import time
from pathlib import Path

import pytest
import torch

from mosaicbert import run
from mosaicbert.cli import main
from mosaicbert.config import (
    ClassifyConfig,
    GlueConfig,
    ModelConfig,
    PretrainConfig,
    TrainerConfig,
    check,
    load_config,
)
from mosaicbert.data.examples import sample_examples
from mosaicbert.duration import Progress
from mosaicbert.errors import ConfigError
from mosaicbert.glue_suite.planning import plan_jobs
from mosaicbert.models.build import build_model
from mosaicbert.plan import read_plan
from mosaicbert.plan.command import measured
from mosaicbert.plan.glue import _queue_seconds
from mosaicbert.plan.machine import machine_of
from mosaicbert.plan.probe import Probe, probe_job
from mosaicbert.train.distributed import Ranks
from mosaicbert.train.record import TrainResult

ROOT = Path(__file__).parents[2]
BASE = str(ROOT / "yamls/main/mosaic-bert-base-uncased.yaml")
RECORD = ROOT / "benchmarks/records/2026-11-24-pretrain-base-h100.json"
TINY = ["model.model_config={hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2}"]


def h100(*overrides, gpus=1, **options):
    return read_plan(BASE, overrides, gpu="h100", gpus=gpus, **options)


def test_memory_and_time_are_within_15_per_cent_of_the_record():
    record = json.loads(RECORD.read_text())
    last = record["rows"][-1]
    size = ["global_train_batch_size=512", "device_train_microbatch_size=512"]
    found = h100(*size, f"max_duration={last['batch']}ba")
    peak = max(row["memory/peak_allocated_mem"] for row in record["rows"]) * 1e9
    assert found["memory"]["total"] == pytest.approx(peak, rel=0.15)
    first = record["rows"][0]  # the time before it is compilation
    seconds = last["seconds"] - first["seconds"]
    share = (last["token"] - first["token"]) / last["token"]
    assert found["seconds"] * share == pytest.approx(seconds, rel=0.15)


def test_the_whole_recipe():
    found = h100(gpus=8, price=2.0)
    assert found["parameters"] == 137_400_384
    assert (found["steps"], found["samples"]) == (70_000, 286_720_000)
    assert found["cost"] == pytest.approx(found["seconds"] / 3600 * 16)
    assert found["checkpoint"]["bytes"] == 12 * 137_400_384
    assert not found["problems"]
    assert found["seconds"] == pytest.approx(h100()["seconds"] / 8)


def test_a_microbatch_that_fits_does_and_the_next_does_not():
    most = h100("device_train_microbatch_size=1")["microbatch"]["most"]
    assert not h100(f"device_train_microbatch_size={most}")["problems"]
    (problem,) = h100(f"device_train_microbatch_size={most + 1}")["problems"]
    assert "does not fit" in problem
    assert "device_train_microbatch_size=" in problem


def test_auto_takes_what_fits():
    found = read_plan(BASE, ["device_train_microbatch_size=auto"], gpu="T4", gpus=1)
    assert found["microbatch"]["samples"] == 128 <= found["microbatch"]["most"] < 512
    assert any("no record of pre-training like this" in note for note in found["notes"])


def test_gradient_checkpointing_makes_room():
    plain, small = h100(), h100("model.gradient_checkpointing=true")
    assert small["microbatch"]["most"] > 3 * plain["microbatch"]["most"]


def test_what_will_not_fit_is_told_with_its_remedy():
    (problem,) = h100("max_seq_len=2000000")["problems"]
    assert "Not even one sample" in problem
    assert "gradient_checkpointing" in problem
    (problem,) = h100(gpus=7)["problems"]
    assert "Set 4095 or 4102" in problem


def test_several_gpus_hold_the_gradients_twice():
    one, two = h100()["memory"], h100(gpus=2)["memory"]
    assert two["gradients"] == 2 * one["gradients"]
    assert two["optimizer"] == one["optimizer"]


def test_muon_keeps_one_moment_of_hidden_matrices():
    adam, muon = h100()["memory"], h100("optimizer.name=muon")["memory"]
    assert 0.5 < muon["optimizer"] / adam["optimizer"] < 0.75


def test_data_and_checkpoints(tmp_path):
    data = tmp_path / "data"
    words = ["--dataset", "sample", "--out_root", str(data), "--splits", "train_small"]
    assert main(["convert", *words]) == 0
    overrides = [
        f"train_loader.dataset={{remote: {data}, local: {tmp_path / 'local'}, split: train_small}}",
        "max_duration=3ep", "save_interval=1ep", f"save_folder={tmp_path}", *TINY,
        "global_train_batch_size=16", "save_num_checkpoints_to_keep=2",
    ]  # fmt: skip
    found = h100(*overrides)
    index = json.loads((data / "train_small/index.json").read_text())
    assert found["data"]["samples"] == sum(shard["samples"] for shard in index["shards"])
    assert found["data"]["download_bytes"] > 0
    assert found["epochs"] == pytest.approx(3, rel=0.1)
    assert found["checkpoint"]["kept"] == 2
    here = h100(*overrides, f"train_loader.dataset.local={data}")
    assert here["data"]["download_bytes"] == 0


@pytest.mark.parametrize("gpu", ["h100", "A100", "l4", "rtx 4090"])
def test_text_fits_into_80_columns(gpu, capsys):
    assert main(["plan", BASE, "--gpu", gpu, "--gpus", "8", "--price", "2", *TINY]) in (0, 1)
    text = capsys.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines() if " /" not in line)
    assert "memory" in text
    assert "\x1b" not in text


def test_json_is_the_same_plan(capsys):
    assert main(["plan", BASE, "--gpu", "h100", "--json", "model.name=hf_bert"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["speed"]["mfu"] == 0.238
    assert found["memory"]["total"] > found["memory"]["activations"]


def test_a_gpu_that_is_not_known_is_told():
    with pytest.raises(ConfigError, match=r'--gpu h1000: not known\. Did you mean "H100"'):
        machine_of("h1000", 1)
    with pytest.raises(ConfigError, match="at least one"):
        machine_of("h100", 0)


CLASSIFY = ROOT / "yamls/test/sequence_classification.yaml"
GLUE = ROOT / "yamls/test/glue.yaml"


def probe(**changes):
    values = {"steps": 9, "tokens_per_second": 1000.0, "eval_tokens_per_second": 4000.0}
    values |= {"peak_bytes": 10**9, "start_seconds": 5.0, "cpu_share": 1.0}
    return Probe(**(values | changes))


def test_classification_counts_its_data_and_evaluations():
    found = read_plan(CLASSIFY, ["max_duration=2ep", "eval_interval=1ep"], probes={"x": probe()})
    examples = found["data"]["samples"]
    assert found["steps"] == 2 * (examples // 16)  # drop_last
    assert 10 < found["tokens_per_sample"] < 128
    assert found["seconds"] == pytest.approx(found["tokens"] / 1000)
    assert found["evaluations"] == 2
    tokens = len(sample_examples("validation")) * found["tokens_per_sample"]
    assert found["evaluation_seconds"] == pytest.approx(2 * tokens / 4000)
    assert found["memory"]["process"] > 10e6


def test_classification_on_a_gpu_tells_that_nobody_measured_it():
    found = read_plan(CLASSIFY, ["data.train=gone.csv"], gpu="h100", gpus=1)
    assert "seconds" not in found
    assert any("gone.csv does not exist" in note for note in found["notes"])
    assert any("no record of fine-tuning" in note for note in found["notes"])


def test_glue_sums_its_jobs(capsys):
    probes = {"mnli": probe(), "rte": probe(peak_bytes=2 * 10**9, start_seconds=1.0)}
    found = read_plan(GLUE, probes=probes)
    assert (found["jobs"], found["steps"]) == (3, 12)
    rows = {row["task"]: row for row in found["tasks"]}
    assert found["seconds"] == pytest.approx(rows["mnli"]["seconds"] + 2 * rows["rte"]["seconds"])
    assert found["memory"]["total"] == max(row["memory_bytes"] for row in rows.values())
    assert found["measured"]["peak_bytes"] == 2 * 10**9
    assert found["measured"]["start_seconds"] == 2 * 5 + 1
    assert main(["plan", str(GLUE)]) == 0
    text = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["rte", "2"] for line in text)
    assert all(len(line) <= 80 for line in text)


def test_jobs_of_glue_that_wait_for_mnli_do_so_in_the_plan():
    jobs = plan_jobs(load_config(GlueConfig, GLUE))  # MNLI, and two of RTE
    plans = {"mnli": {"seconds": 10.0, "evaluation_seconds": 2.0}, "rte": {"seconds": 3.0}}
    assert [_queue_seconds(jobs, plans, slots) for slots in (1, 2, 8)] == [18, 15, 15]

    probes = dict.fromkeys(("mnli", "rte"), probe())
    found, alone = (
        read_plan(GLUE, ["parallel=true"], gpu="h100", gpus=gpus, price=3600, probes=probes)
        for gpus in (8, 1)
    )
    whole = found["seconds"] + found["evaluation_seconds"]
    assert alone["cost"] / 3 < whole < alone["cost"]
    assert found["cost"] == pytest.approx(8 * whole)


def test_glue_of_the_hub_is_planned_without_fetching_it():
    found = read_plan(ROOT / "yamls/finetuning/glue/mosaic-bert-base-uncased.yaml", gpu="h100")
    rows = {row["task"]: row for row in found["tasks"]}
    assert rows["mnli"]["steps"] == math.ceil(3 * 392_702 / 48)
    assert rows["mnli"]["tokens_per_sample"] == 256
    assert not found["problems"]


def test_steps_are_measured_on_the_machine_they_are_planned_for():
    config = load_config(ClassifyConfig, CLASSIFY)
    with pytest.raises(ConfigError, match="takes steps on this machine, which has no 1 x H200"):
        measured(config, machine_of("h200", 1))


def test_a_probe_takes_a_few_microbatches_and_writes_nowhere_else():
    values = load_config(PretrainConfig, BASE).model_dump(mode="json", by_alias=True)
    values |= {"mlm_probability": [0.3, 0.1], "save_folder": "s3://bucket", "loggers": {}}
    seen = []

    def run(short):
        config = check(PretrainConfig, short)
        seen.append(config)
        Path(config.run_folder).mkdir()
        row = {"loss/train/total": 1.0, "seconds": 8.0}
        Path(config.run_folder, "metrics.jsonl").write_text(json.dumps(row))
        steps = int(config.max_duration[:-2])
        progress = Progress(batch=steps, sample=steps * 40, token=steps * 4000)
        return TrainResult(progress, 1.0, {"metrics/eval/loss": 1.0}, None, 20.0, 2000.0)

    found = probe_job(values, 10, 10.0, run, time.time())
    warm, measured_run = seen
    assert (warm.max_duration, measured_run.max_duration) == ("2ba", "5ba")  # 2 s a step
    assert warm.global_train_batch_size == 40
    assert warm.mlm_probability == pytest.approx(0.2)
    assert (warm.save_folder, warm.loggers) == (None, None)
    samples = 2 * warm.device_eval_batch_size
    assert found.eval_tokens_per_second == pytest.approx(samples * 100 / 10)  # 20 - 8 - 2 s


BASE_SHAPE = {"hidden_size": 768, "num_hidden_layers": 12}
LARGE_SHAPE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}


@pytest.mark.parametrize(
    ("name", "shape", "precision", "memory", "least", "most"),
    [
        ("mosaic_bert", BASE_SHAPE, None, None, 64, 64),
        ("mosaic_bert", BASE_SHAPE, "fp8", 85e9, 750, 900),  # 512 take 45 GB
        ("mosaic_bert", BASE_SHAPE, "fp32", 85e9, 375, 450),
        ("mosaic_bert", BASE_SHAPE, None, 150e9, 1024, 1024),
        ("mosaic_bert", BASE_SHAPE, None, 25e9, 200, 250),
        ("mosaic_bert", BASE_SHAPE, None, 1e9, 16, 16),
        ("mosaic_bert", LARGE_SHAPE, None, 85e9, 250, 310),
        ("hf_bert", BASE_SHAPE, None, 85e9, 512, 512),  # 512 take 32 GB, twice with graphs
    ],
)
def test_auto_starts_by_memory_and_model(name, shape, precision, memory, least, most):
    settings = ModelConfig(name=name, model_config=shape)
    with torch.device("meta"):
        model = build_model(settings, "mlm", max_seq_len=128, vocab_size=30_522)
    samples = run.auto_samples(model, precision, memory, 128, 4096)
    assert least <= samples <= most
    assert samples % 8 == 0
    assert run.auto_samples(model, precision, memory, 100_000, 4096) == 1
    assert run.auto_samples(model, precision, memory, 128, 10) == 10


@pytest.mark.parametrize(
    ("name", "batch", "samples"),
    [("mosaic_bert", 100, 64), ("hf_bert", 100, 50), ("hf_bert", 128, 64), ("hf_bert", 7, 7)],
)
def test_auto_fills_padded_microbatches(name, batch, samples):
    with torch.device("meta"):
        settings = ModelConfig(name=name, model_config=BASE_SHAPE)
        model = build_model(settings, "mlm", max_seq_len=128, vocab_size=30_522)
    config = TrainerConfig(max_duration="1ba", global_train_batch_size=batch)
    ranks = Ranks(0, 1, 0, torch.device("cpu"))  # there 8,192 tokens
    assert run.microbatch_samples(config, ranks, 128, model) == samples
