import json
from pathlib import Path

import pytest

from mosaicbert.cli import main
from mosaicbert.errors import ConfigError
from mosaicbert.plan import read_plan
from mosaicbert.plan.machine import machine_of

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
    assert 1 <= found["microbatch"]["samples"] == found["microbatch"]["most"] < 512
    assert any("nothing like this was measured" in note for note in found["notes"])


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
    assert found["speed"]["mfu"] == 0.234
    assert found["memory"]["total"] > found["memory"]["activations"]


def test_a_gpu_that_is_not_known_is_told():
    with pytest.raises(ConfigError, match=r'--gpu h1000: not known\. Did you mean "H100"'):
        machine_of("h1000", 1)
    with pytest.raises(ConfigError, match="at least one"):
        machine_of("h100", 0)
