import importlib.metadata
import json
import os
import resource
import shutil
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mosaicbert.cli import main
from mosaicbert.config import ClassifyConfig, GlueConfig, PretrainConfig, load_config
from mosaicbert.doctor import job, machine
from mosaicbert.doctor.check import within
from mosaicbert.models import kernels

ROOT = Path(__file__).parents[2]


def only(found):
    (check,) = found
    return check


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def config(tmp_path, **changes):
    values = {
        "max_duration": "1ba",
        "global_train_batch_size": 4,
        "model": {"name": "mosaic_bert"},
        "run_folder": str(tmp_path),
        "train_loader": {"dataset": {"local": str(tmp_path), "split": "train"}},
    }
    return PretrainConfig(**(values | changes))


def with_index(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/index.json").write_text("{}")


def test_this_very_environment_has_what_is_needed():
    found = list(machine.check_packages())
    assert {check.name for check in found} >= {"python", "torch", "transformers"}
    assert {check.state for check in found if check.name != "bytecode"} == {"ok"}


def test_no_bytecode_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.torch, "__file__", str(tmp_path / "torch/__init__.py"))
    found = {check.name: check for check in machine.check_packages()}
    assert found["bytecode"].state == "warning"
    assert f"compileall -q {tmp_path}" in found["bytecode"].remedy


def test_a_package_that_runs_from_its_sources_is_a_warning(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    found = {check.name: check for check in machine.check_packages()}
    assert found["mosaicbert"].state == "warning"
    assert "pip install" in found["mosaicbert"].remedy


def test_a_package_that_is_too_old_or_missing_is_a_problem(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["torch>=99", "no-such-thing>=2"])
    old, missing = [c for c in machine.check_packages() if c.state == "problem"]
    assert "torch>=99 is needed" in old.text
    assert old.remedy == "pip install 'torch>=99'"
    assert missing.text.startswith("is missing")


@pytest.mark.parametrize(
    ("driver", "cuda", "state", "word"),
    [
        (None, None, "note", "none"),
        ("550.1", None, "problem", "built without CUDA"),
        ("550.1", "13.0", "problem", "torch cannot use the GPU"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_a_problem(monkeypatch, driver, cuda, state, word):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(machine, "_nvidia_smi", lambda: driver)
    check = only(machine.check_gpus())
    assert check.state == state
    assert word in check.text


def a_gpu(monkeypatch, free):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80e9))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(machine, "_nvidia_smi", lambda: "550.1")
    monkeypatch.setattr(machine, "_device", lambda index: torch.device("cpu"))


def test_a_gpu_that_others_use_is_a_warning(monkeypatch):
    a_gpu(monkeypatch, free=10e9)
    _, check = machine.check_gpus()
    assert check.state == "warning"
    assert "10 of 80 GB free" in check.text
    a_gpu(monkeypatch, free=79e9)
    assert [check.state for check in machine.check_gpus()] == ["ok", "ok"]


def test_a_gpu_that_is_seen_but_cannot_be_used_is_a_problem(monkeypatch):
    def fail(index):
        raise RuntimeError("CUDA error: no kernel image is available\nmore lines")

    a_gpu(monkeypatch, free=79e9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    _, check = machine.check_gpus()
    assert check.state == "problem"
    assert check.text.endswith("no kernel image is available")
    assert "CUDA_VISIBLE_DEVICES" in check.remedy


def test_several_gpus_need_nccl_and_rocm_is_named(monkeypatch):
    a_gpu(monkeypatch, free=79e9)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    cuda, first, second, nccl = machine.check_gpus()
    assert cuda.text.startswith("ROCm 7.1")
    assert (first.state, second.state, nccl.state) == ("ok", "ok", "problem")


def test_a_gpu_of_unknown_peak_is_told(monkeypatch):
    a_gpu(monkeypatch, free=79e9)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 MIG 1g.10gb")
    _, check = machine.check_gpus()
    assert "no MFU" in check.text


def test_kernels_on_a_gpu(monkeypatch, tmp_path):
    a_gpu(monkeypatch, free=79e9)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/cc")
    monkeypatch.setattr(kernels, "why_not", lambda _: None)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda _: str(tmp_path))
    versions = {"triton": "3.7.1"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions[name])
    assert [check.state for check in machine.check_compiler()] == ["ok", "ok"]
    versions["triton"] = "3.5.0"
    old, _ = machine.check_compiler()
    assert (old.state, "triton>=3.6" in old.remedy) == ("warning", True)
    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.setattr(machine.importlib, "import_module", lambda _: Triton)
    assert next(machine.check_compiler()).text.startswith("Triton 3.8.0")
    (tmp_path / "Python.h").unlink()
    assert list(machine.check_compiler())[1].remedy.startswith("apt-get install python3-dev")
    monkeypatch.setattr(kernels, "why_not", lambda _: "NVIDIA T4 is older than 8.0")
    assert next(machine.check_compiler()).state == "note"


Triton = SimpleNamespace(__version__="3.8.0")


def absent(name):
    raise importlib.metadata.PackageNotFoundError(name)


def test_which_attention_runs_on_a_gpu(monkeypatch, tmp_path):
    a_gpu(monkeypatch, free=79e9)
    tiny = {"name": "mosaic_bert", "pretrained_model_name": "prajjwal1/bert-tiny"}
    tiny["model_config"] = {"num_attention_heads": 2}  # heads of 64, as the shape has them
    check = only(job.check_attention(config(tmp_path, model=tiny)))
    assert (check.state, check.text.startswith("triton on cuda")) == ("ok", True)
    dropout = {"name": "mosaic_bert", "model_config": {"attention_probs_dropout_prob": 0.1}}
    check = only(job.check_attention(config(tmp_path, model=dropout)))
    assert (check.state, check.text.startswith("sdpa on cuda")) == ("warning", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    check = only(job.check_attention(config(tmp_path, model=tiny)))
    assert "older than" in check.text


def test_no_c_compiler_is_a_problem_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(kernels, "why_not", lambda _: "triton is not installed")
    assert [check.state for check in machine.check_compiler()] == ["note", "note"]
    a_gpu(monkeypatch, free=79e9)
    assert [check.state for check in machine.check_compiler()] == ["warning", "problem"]


@pytest.mark.parametrize(
    ("load", "cores", "limit", "environment", "remedy"),
    [
        (0.5, 8, None, {}, ""),
        (20.0, 8, None, {}, "GOMP_SPINCOUNT=0"),
        (20.0, 8, None, {"GOMP_SPINCOUNT": "0"}, ""),
        (0.5, 64, 4.0, {}, "OMP_NUM_THREADS=4"),
        (0.5, 64, 4.0, {"OMP_NUM_THREADS": "4"}, ""),
    ],
)
def test_threads_that_wait_for_one_another(monkeypatch, load, cores, limit, environment, remedy):
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(machine, "_cpu_limit", lambda: limit)
    check = only(machine.check_threads())
    assert check.state == ("warning" if remedy else "ok")
    assert remedy in check.remedy


def test_little_shared_memory_and_few_files_are_warnings(monkeypatch):
    usage = SimpleNamespace(free=0.06e9, total=0.064e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert only(machine.check_shared_memory()).remedy.startswith("start the container with")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    assert {check.state for check in machine.check_limits()} == {"warning"}


def test_the_hub(monkeypatch, offline):
    assert only(machine.check_hub()).text.startswith("HF_HUB_OFFLINE")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}/x")
        assert only(machine.check_hub()).state == "ok"
    assert "does not answer" in only(machine.check_hub()).text


def test_which_attention_runs_and_why(tmp_path):
    check = only(job.check_attention(None))
    assert check.text.startswith("sdpa on cpu: ")
    wrong = {"name": "mosaic_bert", "model_config": {"attention_backend": "nosuch"}}
    assert only(job.check_attention(config(tmp_path, model=wrong))).state == "problem"
    hf = config(tmp_path, model={"name": "hf_bert"})
    assert "scaled_dot_product" in only(job.check_attention(hf)).text
    if not torch.cuda.is_available():
        found = list(job.check_attention(config(tmp_path, device="gpu")))
        assert found[0].state == "problem"


def test_data_that_is_not_there_is_a_problem(tmp_path):
    check = only(job.check_data(config(tmp_path)))
    assert check.state == "problem"
    assert "mosaicbert convert" in check.remedy
    with_index(tmp_path)
    assert only(job.check_data(config(tmp_path))).state == "ok"


def test_files_of_fine_tuning(tmp_path, monkeypatch):
    glue = load_config(GlueConfig, ROOT / "yamls/test/glue.yaml", [f"data_dir={tmp_path}"])
    assert {check.state for check in job.check_files(glue)} == {"problem"}
    (tmp_path / "mnli").mkdir()
    assert [check.state for check in job.check_files(glue)] == ["ok", "problem"]
    monkeypatch.setattr(job, "find_spec", lambda _: None)
    hub = glue.model_copy(update={"data_dir": None})
    assert "mosaicbert[hub]" in only(job.check_files(hub)).remedy
    words = ["data.train=gone.csv", f"data.validation={tmp_path}/mnli"]
    yaml = ROOT / "yamls/test/sequence_classification.yaml"
    found = list(job.check_files(load_config(ClassifyConfig, yaml, words)))
    assert [check.state for check in found] == ["problem", "ok"]


@pytest.mark.parametrize("scheme", ["nosuch", "file"])
def test_data_in_a_store(tmp_path, scheme):
    remote = f"{scheme}://{tmp_path}"
    dataset = {"remote": remote, "local": str(tmp_path / "local"), "split": "train"}
    wanted = config(tmp_path, train_loader={"dataset": dataset})
    assert only(job.check_data(wanted)).state == "problem"
    with_index(tmp_path)
    assert only(job.check_data(wanted)).state == ("ok" if scheme == "file" else "problem")


def test_checkpoints_folders_and_tokenizers(tmp_path, offline):
    assert not list(job.check_stores(config(tmp_path, save_folder=str(tmp_path / "new"))))
    store = config(tmp_path, save_folder=f"file://{tmp_path}/new")
    assert "will be made" in only(job.check_stores(store)).text
    gone = config(tmp_path, load_path=str(tmp_path / "gone"))
    assert only(job.check_stores(gone)).state == "problem"
    assert only(job.check_tokenizer(config(tmp_path))).state == "ok"
    unknown = config(tmp_path, tokenizer_name=str(tmp_path))
    assert only(job.check_tokenizer(unknown)).state == "problem"


def test_little_room_is_told(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=1e9, total=2e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert {check.state for check in job.check_folders(config(tmp_path))} == {"warning"}
    usage.free = 1e6
    assert {check.state for check in job.check_folders(config(tmp_path))} == {"problem"}


def test_a_wait_ends():
    with pytest.raises(TimeoutError):
        within(0.05, threading.Event().wait)
    assert within(5, lambda: 3) == 3


def test_the_command_ends_with_1_where_a_run_would_stop(tmp_path, offline, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(config(tmp_path).model_dump(by_alias=True, exclude_unset=True)))
    assert main(["doctor", str(path)]) == 1
    text = capsys.readouterr().out
    assert "1 problem," in text
    assert "\x1b" not in text
    assert all(len(line) <= 80 or "/" in line for line in text.splitlines())
    with_index(tmp_path)
    assert main(["doctor", "--json", str(path)]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert {"name", "state", "text", "remedy"} == set(checks[0])
