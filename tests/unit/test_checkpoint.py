"""Checkpoints: exact resume, whole at any moment, strict about what they are loaded into."""

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import TinyLoader, TinyModel, assert_same, make_trainer, moments, weights

from mosaicbert import retrying
from mosaicbert.config.sections import HealthCheckerConfig
from mosaicbert.errors import CheckpointError, ConfigError
from mosaicbert.train import store
from mosaicbert.train.monitors import HealthChecker
from mosaicbert.train.store import SaveFolder, locate
from mosaicbert.train.writer import CheckpointWriter

OPTIMIZERS = ["decoupled_adamw", "adamw", "stable_adamw", "muon"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("duration", ["12ba", "3ep"])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, optimizer, duration):
    changes = {"optimizer": {"name": optimizer, "lr": 1e-2}, "max_duration": duration}
    whole, full = make_trainer(save_folder=str(tmp_path / "whole"), **changes)
    whole.fit()
    shutil.copytree(tmp_path / "whole/ep0-ba4", tmp_path / "cut/ep0-ba4")
    resumed, rest = make_trainer(
        model=TinyModel(seed=1), load_path=str(tmp_path / "cut/ep0-ba4"), **changes
    )
    result = resumed.fit()
    assert_same(weights(whole), weights(resumed))
    assert_same(moments(whole), moments(resumed))
    assert rest.losses == {batch: loss for batch, loss in full.losses.items() if batch > 4}
    assert rest.values("metrics/eval/loss") == full.values("metrics/eval/loss")
    assert result.progress.token == whole.progress.token


def test_resumed_loss_scale_is_that_of_the_run(tmp_path):
    first, _ = make_trainer(precision="amp_fp16", save_folder=str(tmp_path), max_duration="4ba")
    first.scaler.load_state_dict({**first.scaler.state_dict(), "scale": 128.0})
    first.fit()
    second, _ = make_trainer(precision="amp_fp16", save_folder=str(tmp_path), autoresume=True)
    second.saving.start()
    assert second.scaler.get_scale() == first.scaler.get_scale() == 128.0


def test_autoresume_is_the_same_command_again(tmp_path):
    changes = {"save_folder": f"{tmp_path}/{{run_name}}", "run_name": "mine", "autoresume": True}
    make_trainer(max_duration="8ba", **changes)[0].fit()
    longer, recorder = make_trainer(max_duration="12ba", **changes)
    assert longer.fit().checkpoint == f"{tmp_path}/mine/ep2-ba12"
    assert list(recorder.losses) == [9, 10, 11, 12]
    again, recorder = make_trainer(max_duration="12ba", **changes)
    result = again.fit()
    assert recorder.losses == {}
    assert result.progress.batch == 12
    assert result.metrics == longer.metrics


def test_a_folder_holds_what_is_documented(tmp_path):
    def write_assets(folder):
        (folder / "config.json").write_text("{}")

    trainer, recorder = make_trainer(save_folder=str(tmp_path), write_assets=write_assets)
    result = trainer.fit()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ep0-ba4",
        "ep1-ba8",
        "ep2-ba10",
        "latest",
    ]
    folder = Path(result.checkpoint)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    saved = load_file(folder / "model.safetensors")
    assert "embeddings.weight" in saved
    assert "decoder.weight" not in saved  # tied: stored once
    assert torch.equal(saved["embeddings.weight"], trainer.model.decoder.weight)
    assert "decoder.bias/exp_avg" in load_file(folder / "optimizer.safetensors")
    state = json.loads((folder / "state.json").read_text())
    assert state["progress"]["batch"] == 10
    assert state["config"]["optimizer"]["name"] == "decoupled_adamw"
    assert list(recorder.values("checkpoint/batch").values())[-1] == 10


def test_old_checkpoints_go(tmp_path):
    make_trainer(save_folder=str(tmp_path), save_interval="2ba", save_num_checkpoints_to_keep=2)[
        0
    ].fit()
    assert SaveFolder(str(tmp_path)).names() == ["ep1-ba8", "ep2-ba10"]


def test_keeping_none_writes_none(tmp_path):
    trainer, _ = make_trainer(save_folder=str(tmp_path / "x"), save_num_checkpoints_to_keep=0)
    assert trainer.fit().checkpoint is None
    assert not (tmp_path / "x").exists()


def test_another_runs_folder_is_refused_unless_overwritten(tmp_path):
    make_trainer(save_folder=str(tmp_path), max_duration="12ba")[0].fit()
    trainer, _ = make_trainer(save_folder=str(tmp_path))
    with pytest.raises(ConfigError, match="another run's checkpoints"):
        trainer.fit()
    make_trainer(save_folder=str(tmp_path), max_duration="8ba", save_overwrite=True)[0].fit()
    assert SaveFolder(str(tmp_path)).newest() == "ep1-ba8"
    assert not list(tmp_path.glob(".part-*"))


def test_load_path_names_a_checkpoint_a_save_folder_or_latest(tmp_path):
    make_trainer(save_folder=str(tmp_path))[0].fit()
    assert locate(f"{tmp_path}/ep0-ba4")[1] == "ep0-ba4"
    assert locate(str(tmp_path))[1] == "ep2-ba10"
    assert locate(f"{tmp_path}/latest")[1] == "ep2-ba10"
    for missing in (f"{tmp_path}/ep9-ba9", f"{tmp_path}/nothing"):
        with pytest.raises(CheckpointError, match="no checkpoint of a run"):
            locate(missing)


def test_latest_that_names_nothing_falls_back(tmp_path):
    make_trainer(save_folder=str(tmp_path))[0].fit()
    (tmp_path / "latest").write_text("ep7-ba70\n")
    assert SaveFolder(str(tmp_path)).newest() == "ep2-ba10"


def test_another_shape_lists_what_differs(tmp_path):
    make_trainer(save_folder=str(tmp_path))[0].fit()
    folder = tmp_path / "ep2-ba10"
    tensors = load_file(folder / "model.safetensors")
    tensors["extra.weight"] = torch.zeros(2)
    tensors["decoder.bias"] = torch.zeros(3)
    del tensors["encoder.layer.0.wo.bias"]
    save_file(tensors, folder / "model.safetensors")
    trainer, _ = make_trainer(load_path=str(folder))
    with pytest.raises(CheckpointError) as caught:
        trainer.fit()
    message = str(caught.value)
    assert "Missing: encoder.layer.0.wo.bias" in message
    assert "Unknown: extra.weight" in message
    assert "decoder.bias (3,) (the model's: (32,))" in message


def test_another_optimizer_is_refused(tmp_path):
    make_trainer(save_folder=str(tmp_path))[0].fit()
    trainer, _ = make_trainer(load_path=str(tmp_path), optimizer={"name": "muon"})
    with pytest.raises(ConfigError, match="load_weights_only"):
        trainer.fit()


@pytest.mark.parametrize("key", ["run_id", "optimizer", "scaler", "config"])
@pytest.mark.parametrize("value", [None, 7])
def test_a_state_without_what_a_run_asks_for_is_damaged(tmp_path, key, value):
    first, _ = make_trainer(save_folder=str(tmp_path), max_duration="2ba")
    first.fit()
    path = tmp_path / "ep0-ba2/state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {key: value}))
    with pytest.raises(CheckpointError, match=f"damaged .*has no {key}"):
        make_trainer(load_path=str(tmp_path / "ep0-ba2"))[0].fit()
    path.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="damaged"):
        make_trainer(load_path=str(tmp_path / "ep0-ba2"))[0].fit()


@pytest.mark.parametrize("gone", ["exp_avg", "exp_avg_sq", "step"])
def test_moments_in_part_are_damaged(tmp_path, gone):
    first, _ = make_trainer(save_folder=str(tmp_path), max_duration="2ba")
    first.fit()
    path = tmp_path / "ep0-ba2/optimizer.safetensors"
    kept = {name: t for name, t in load_file(path).items() if not name.endswith(f"/{gone}")}
    save_file(kept, path)
    with pytest.raises(CheckpointError, match="damaged"):
        make_trainer(load_path=str(tmp_path / "ep0-ba2"))[0].fit()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_file_is_an_error(tmp_path, name):
    make_trainer(save_folder=str(tmp_path))[0].fit()
    path = tmp_path / "ep2-ba10" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    trainer, _ = make_trainer(load_path=str(tmp_path))
    with pytest.raises(CheckpointError, match="damaged"):
        trainer.fit()


def test_a_failed_write_surfaces_and_leaves_the_one_before(tmp_path):
    def write_assets(folder):
        if "ba8" in folder.name:
            raise OSError("disk full")

    trainer, _ = make_trainer(save_folder=str(tmp_path), write_assets=write_assets)
    with pytest.raises(CheckpointError, match="disk full"):
        trainer.fit()
    assert SaveFolder(str(tmp_path)).newest() == "ep0-ba4"


def test_weights_only_is_left_to_the_caller(tmp_path):
    trainer, recorder = make_trainer(load_path=str(tmp_path / "none"), load_weights_only=True)
    trainer.fit()
    assert len(recorder.losses) == 10


def test_a_uri_works_like_a_folder():
    uri = "memory://bucket/{run_name}/ckpt"
    changes = {"save_folder": uri, "run_name": "remote", "save_num_checkpoints_to_keep": 1}
    first, _ = make_trainer(max_duration="8ba", scheduler={"t_warmup": "2ba"}, **changes)
    first.fit()
    fs = fsspec.filesystem("memory")
    assert fs.cat("/bucket/remote/ckpt/latest") == b"ep1-ba8"
    assert SaveFolder("memory://bucket/remote/ckpt").names() == ["ep1-ba8"]
    second, recorder = make_trainer(
        max_duration="12ba", scheduler={"t_warmup": "2ba"}, autoresume=True, **changes
    )
    result = second.fit()
    assert list(recorder.losses) == [9, 10, 11, 12]
    assert result.checkpoint == "memory://bucket/remote/ckpt/ep2-ba12"


def test_uploads_are_tried_again(monkeypatch):
    monkeypatch.setattr(retrying, "WAITS", (0.0, 0.0, 0.0))
    fs = fsspec.filesystem("memory")
    failures = iter([True, True, False] * 100)
    put_file = fs.put_file

    def shaky(*args, **kwargs):
        if next(failures):
            raise ConnectionError("reset by peer")
        put_file(*args, **kwargs)

    monkeypatch.setattr(type(fs), "put_file", lambda self, *a, **k: shaky(*a, **k))
    trainer, _ = make_trainer(save_folder="memory://shaky", max_duration="2ba")
    trainer.fit()
    assert SaveFolder("memory://shaky").newest() == "ep0-ba2"


def test_an_unknown_scheme_says_what_to_do():
    with pytest.raises(ConfigError, match="no way to nowhere://"):
        SaveFolder("nowhere://bucket/x")


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.mark.parametrize("survives", range(6))
@pytest.mark.parametrize("again", [False, True])
def test_a_kill_between_any_two_renames(tmp_path, monkeypatch, survives, again):
    """`again`: the checkpoint replaces one of the same name."""
    trainer, _ = make_trainer(save_folder=str(tmp_path), max_duration="4ba")
    trainer.fit()
    trainer, _ = make_trainer(save_folder=str(tmp_path), max_duration="4ba", save_overwrite=True)
    trainer.saving.start()
    trainer.progress.batch = 4 if again else 5
    left = iter(range(survives))
    for owner, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree")):
        original = getattr(owner, name)

        def call(*args, original=original, **kwargs):
            if next(left, None) is None:
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)
    folder = SaveFolder(str(tmp_path))
    taken = []
    monkeypatch.setattr(CheckpointWriter, "save", lambda self, c, only_state: taken.append(c))
    trainer.saving.save(trainer.progress)
    with contextlib.suppress(Killed):
        folder.write(taken[0], None)
    monkeypatch.undo()
    folder.recover()
    folder.read(folder.newest())
    assert {path.name for path in tmp_path.iterdir()} <= {"ep0-ba4", "ep0-ba5", "latest"}


KILLED = """
import sys
sys.path.insert(0, {here!r})
from tiny_run import make_trainer
print("go", flush=True)
make_trainer(save_folder={folder!r}, save_interval="1ba", max_duration="100000ba",
    evaluate=False, save_num_checkpoints_to_keep=2)[0].fit()
"""


def test_kill_at_any_moment_leaves_a_loadable_checkpoint(tmp_path):
    program = KILLED.format(here=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout.readline() == b"go\n"
    kept = tmp_path / "ep0-ba2"
    deadline = time.monotonic() + 60
    while not kept.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    process.kill()
    process.communicate()
    reached = SaveFolder(str(tmp_path)).newest()
    batch = int(reached.split("-ba")[1])
    trainer, recorder = make_trainer(
        save_folder=str(tmp_path), autoresume=True, max_duration=f"{batch + 1}ba", evaluate=False
    )
    trainer.fit()
    assert list(recorder.losses) == [batch + 1]
    assert not list(tmp_path.glob(".part-*"))


@pytest.mark.parametrize("uri", ["{}", "memory://{}"])
@pytest.mark.parametrize("latest", [None, "ep9-ba999", "\xff"])
def test_a_kill_before_latest_was_written(uri, latest, tmp_path):
    """Others find a save folder's checkpoint by `latest`: the same command again mends it."""
    save_folder = uri.format(tmp_path)
    make_trainer(save_folder=save_folder, max_duration="4ba")[0].fit()
    folder = SaveFolder(save_folder)
    newest = folder.newest()
    folder.fs.rm_file(f"{folder.root}/latest")
    if latest is not None:
        folder.fs.pipe_file(f"{folder.root}/latest", latest.encode("latin-1"))
    make_trainer(save_folder=save_folder, max_duration="4ba", autoresume=True)[0].fit()
    assert folder.fs.cat_file(f"{folder.root}/latest").decode().strip() == newest


def test_a_kill_before_the_old_ones_went(tmp_path, monkeypatch):
    changes = {"save_folder": str(tmp_path), "save_interval": "1ba", "max_duration": "4ba"}
    changes |= {"save_num_checkpoints_to_keep": 2, "evaluate": False}
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "remove_old", lambda self: None)
        make_trainer(**changes)[0].fit()
    assert len(list(tmp_path.glob("ep*"))) == 4
    make_trainer(**changes, autoresume=True)[0].fit()
    assert len(list(tmp_path.glob("ep*"))) == 2


def test_a_kill_while_an_old_one_goes(tmp_path, monkeypatch):
    changes = {"save_folder": str(tmp_path), "save_interval": "1ba", "evaluate": False}
    make_trainer(**changes, max_duration="2ba")[0].fit()
    folder = SaveFolder(str(tmp_path))
    remove = os.unlink

    def dies(path, *args, **kwargs):
        remove(path, *args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", dies)
        with pytest.raises(Killed):
            folder.remove(folder.names()[0])
    assert len(folder.names()) == 1
    folder.recover()
    assert {path.name for path in tmp_path.iterdir()} == {folder.names()[0], "latest"}


def test_what_a_killed_upload_left_is_cleared_away(tmp_path, monkeypatch):
    monkeypatch.setattr(store.tempfile, "tempdir", str(tmp_path))
    left = []
    with store.scratch_folder() as mine:
        dead = mine.with_name(mine.name + "-of-a-killed-run")  # nobody holds its lock
        dead.mkdir()
        (dead / "model.safetensors").write_bytes(b"x")
        with store.scratch_folder() as other:
            left = sorted(path.name for path in tmp_path.iterdir())
            assert left == sorted([mine.name, other.name])
        with pytest.raises(BlockingIOError), store.scratch_folder():
            raise BlockingIOError  # what happens inside is not taken for its own trouble
    assert not list(tmp_path.iterdir())


def test_resume_at_a_subset_of_an_epoch(tmp_path):
    changes = {"max_duration": "3ep", "train_subset_num_batches": 3}
    whole, full = make_trainer(save_folder=str(tmp_path), **changes)
    whole.fit()
    resumed, rest = make_trainer(load_path=str(tmp_path / "ep1-ba4"), **changes)
    resumed.fit()
    assert rest.losses == {batch: loss for batch, loss in full.losses.items() if batch > 4}


def test_resume_takes_each_sample_once(tmp_path):
    make_trainer(save_folder=str(tmp_path), max_duration="4ba")[0].fit()
    loader = TinyLoader()
    make_trainer(save_folder=str(tmp_path), autoresume=True, max_duration="5ba", loader=loader)[
        0
    ].fit()
    before = TinyLoader()
    steps = before.steps(0)
    for _ in range(4):
        next(steps)
    assert not set(before.seen) & set(loader.seen)
    assert len(set(before.seen) | set(loader.seen)) == 40


def test_autoresume_without_a_save_folder():
    trainer, _ = make_trainer(autoresume=True)
    with pytest.raises(ConfigError, match="save_folder"):
        trainer.fit()


def test_a_resumed_run_judges_as_the_uninterrupted_one(tmp_path):
    def run(duration, folder, **changes):
        checker = HealthChecker(HealthCheckerConfig(on_spike="skip", spike_factor=1.001))
        trainer, _ = make_trainer(
            max_duration=duration,
            save_folder=str(folder),
            optimizer={"lr": 1e-4},  # hardly learns: losses only move about
            scheduler={"name": "constant_with_warmup", "t_warmup": "0ba"},
            monitors=[checker],
            evaluate=False,
            **changes,
        )
        trainer.fit()
        return checker.state_dict(), weights(trainer)

    judged, trained = run("30ba", tmp_path / "whole")
    assert judged["num_spikes"] > 0
    assert len(judged["losses"]) == 30
    run("14ba", tmp_path / "cut")
    again, weights_again = run("30ba", tmp_path / "cut", autoresume=True)
    assert again == judged
    assert_same(weights_again, trained)


def test_a_run_that_keeps_nothing_says_so(caplog):
    with caplog.at_level(logging.INFO):
        make_trainer(max_duration="1ba", scheduler={"t_warmup": "1ba"})[0].fit()
    assert "save_folder is not set: no checkpoints are written." in caplog.text
