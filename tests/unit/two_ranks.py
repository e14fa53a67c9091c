"""What each of two ranks does for `test_distributed.py`; not a test itself.

Run as a program, it becomes both; argument: a folder for their answers.
"""

import importlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tiny_run import TinyLoader, TinyModel, make_trainer, weights

from mosaicbert.config.sections import HealthCheckerConfig
from mosaicbert.errors import ConfigError, TrainingError
from mosaicbert.train.distributed import init_ranks
from mosaicbert.train.monitors import HealthChecker

NUM_SAMPLES = 33  # the last batch of an epoch is one sample: rank 1 has none


class FailsOnRankOne:
    """Runs out of memory on rank 1, in the middle of a backward pass, for large microbatches."""

    def __init__(self, model, rank):
        self.inner, self.rank = model.loss, rank

    def __call__(self, batch, return_logits=False):
        output = self.inner(batch, return_logits)
        if self.rank == 1 and batch.num_samples > 2 and not return_logits:
            output.loss_sum.register_hook(self.fail)
        return output

    def fail(self, grad):
        raise torch.OutOfMemoryError("no more memory")


class NotANumberOnRankOne:
    """The loss of rank 1 is NaN in the chosen step."""

    def __init__(self, model, rank, step):
        self.inner, self.rank, self.left = model.loss, rank, step

    def __call__(self, batch, return_logits=False):
        output = self.inner(batch, return_logits)
        if not return_logits:
            self.left -= 1
            if self.rank == 1 and self.left == 0:
                output.loss_sum = output.loss_sum * math.nan
        return output


class Terminate:
    """A monitor that signals its own process during a batch."""

    def __init__(self, batch):
        self.batch = batch

    def after_step(self, record, trainer):
        if record.progress.batch == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}


def trained(ranks, *, microbatch, fails=False, **changes):
    model = TinyModel(dropout=0.0, seed=ranks.rank)  # rank 0's weights count
    if fails:
        model.loss = FailsOnRankOne(model, ranks.rank)
    loader = TinyLoader(NUM_SAMPLES, 8, microbatch, ranks.rank, ranks.world_size)
    trainer, recorder = make_trainer(model=model, loader=loader, ranks=ranks, **changes)
    result = trainer.fit()
    return {
        "losses": recorder.losses,
        "metrics": result.metrics,
        "tokens": result.progress.token,
        "samples": result.progress.sample,
        "weights": {name: w.tolist() for name, w in weights(trainer).items()},
        "parts": trainer.backward.num_parts,
        "seen": loader.seen,
        "checkpoint": result.checkpoint,
    }


def judged(ranks, folder, option):
    """A run in which one rank's loss is NaN once: what the health checker made of it."""
    model = TinyModel(dropout=0.0)
    model.loss = NotANumberOnRankOne(model, ranks.rank, step=3)
    checker = HealthChecker(HealthCheckerConfig(on_nan=option))
    trainer, _ = make_trainer(
        model=model,
        loader=TinyLoader(40, 8, 8, ranks.rank, ranks.world_size),
        ranks=ranks,
        monitors=[checker],
        evaluate=False,
        max_duration="5ba",
        save_interval="1ba",
        save_folder=str(folder / option),
    )
    try:
        trainer.fit()
    except TrainingError as error:
        return {"error": str(error)}
    steps = {float(state["step"]) for state in trainer.optimizer.state.values()}
    values = {name: w.tolist() for name, w in weights(trainer).items()}
    return {"bad": checker.num_bad_steps, "updates": sorted(steps), "weights": values}


def run(ranks, folder):
    answers = {}
    sizes = (8, 1)  # ranks differ in how many microbatches they have
    answers["plain"] = trained(ranks, microbatch=sizes[ranks.rank])
    answers["muon"] = trained(ranks, microbatch=2, optimizer={"name": "muon", "lr": 1e-2})
    answers["bf16"] = trained(ranks, microbatch=2, gradient_reduction="bf16")
    answers["memory"] = trained(ranks, microbatch=4, fails=True)
    answers["resumed"] = trained(ranks, microbatch=4, load_path=str(folder / "alone/ep0-ba4"))
    answers["saved"] = trained(ranks, microbatch=4, save_folder=str(folder / "two"))

    for option in ("skip", "rewind", "stop"):
        answers[option] = judged(ranks, folder, option)

    answers["rows"] = ranks.gather_rows([np.arange(3)] if ranks.is_first else []).tolist()
    own = {"a": torch.arange(3.0), "b": torch.tensor(True)} if ranks.is_first else {}
    sent = ranks.broadcast_tensors(own)
    answers["sent"] = {name: tensor.tolist() for name, tensor in sent.items()}

    def fail():
        raise ConfigError("only on rank 0")

    try:
        ranks.from_first(fail)
    except ConfigError as error:
        answers["error"] = str(error)

    trainer, _ = make_trainer(
        ranks=ranks,
        loader=TinyLoader(NUM_SAMPLES, 8, 8, ranks.rank, 2),
        monitors=[Terminate(3)] if ranks.rank == 1 else [],
    )
    try:
        trainer.fit()
    except SystemExit as stop:
        answers["stopped"] = [stop.code, trainer.progress.batch]
    return answers


def main(folder):
    ranks = init_ranks("cpu", 60)
    answers = run(ranks, folder)
    if ranks.rank == 1:
        (folder / "1.json").write_text(json.dumps(answers))
        os._exit(9)  # dies without a word
    began = time.monotonic()
    try:
        trained(ranks, microbatch=8)
    except TrainingError as error:
        answers["survivor"] = [str(error), time.monotonic() - began]
    (folder / "0.json").write_text(json.dumps(answers))
    ranks.close()


def both(folder):
    """Rank 1 is forked off rank 0, so that the imports, which take longest, are paid for once."""
    importlib.import_module("torch._dynamo")  # what torch's optimizers import when they are made
    child = os.fork()
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if child else "1"
    main(folder)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(both(Path(sys.argv[1])))
