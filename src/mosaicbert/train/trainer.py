"""The training loop, the same for pre-training and fine-tuning."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mosaicbert.batch import Loader, Step
from mosaicbert.config.jobs import TrainerConfig
from mosaicbert.duration import Duration, Progress
from mosaicbert.errors import DataError, TrainingError
from mosaicbert.train.backward import Backward
from mosaicbert.train.best import Best
from mosaicbert.train.clock import Clock
from mosaicbert.train.distributed import Ranks
from mosaicbert.train.metrics import MetricFactory
from mosaicbert.train.optim import build_optimizer
from mosaicbert.train.reading import Reading
from mosaicbert.train.record import Logger, Monitor, StepRecord, TrainResult
from mosaicbert.train.saving import Saving
from mosaicbert.train.schedule import check_schedule, is_due, lr_factor
from mosaicbert.train.signals import StopSignals


@dataclass(slots=True)
class _Pending:
    """A step whose numbers the host has not read from the device yet."""

    progress: Progress
    loss: Reading
    grad_norm: Reading | None
    lr: dict[str, float]
    mask_rate: float | None
    num_tokens: int
    num_samples: int
    data_wait_seconds: float


class Trainer:
    """Trains a model on a loader's steps, as `config` says.

    Every rank makes one, with the same model and its own share of the data, and calls `fit`. The
    model is moved to the rank's device; whoever made it has compiled it and given it its first
    weights. `load_path` resumes a run as a whole; with `load_weights_only` it is the caller's.
    """

    def __init__(
        self,
        model: nn.Module,
        train_loader: Loader,
        eval_loaders: Mapping[str, tuple[Loader, MetricFactory]],
        *,
        config: TrainerConfig,
        ranks: Ranks,
        loggers: Sequence[Logger] = (),
        monitors: Sequence[Monitor] = (),
        write_assets: Callable[[Path], None] | None = None,
        best: Best | None = None,
    ) -> None:
        """`write_assets` adds `config.json` and tokenizer files to a checkpoint's folder."""
        self.config = config
        self.ranks = ranks
        self.total = Duration.parse(config.max_duration, "max_duration")
        check_schedule(config.scheduler, self.total)
        self.model = model
        self.train_loader = train_loader
        self.eval_loaders = dict(eval_loaders)
        self.loggers = list(loggers) if ranks.is_first else []
        self.monitors = list(monitors)
        self.judges: list[Any] = [m for m in monitors if hasattr(m, "judge")]
        self.backward = Backward(model, config, ranks)
        self.scaler = self.backward.scaler
        self.optimizer = build_optimizer(model, config.optimizer, ranks)
        self.saving = Saving(config, ranks, model, self.optimizer, self.scaler, write_assets)
        self.best = best
        self.signals = StopSignals(self.saving.leaves)
        self.progress = Progress()
        self.has_started = False
        self.batches_per_epoch: int | None = None
        self.metrics: dict[str, float] = {}
        """The last evaluation."""
        # The device may lag behind only where nothing wants a step's numbers or gradients at once.
        waits = self.judges or any(getattr(m, "reads_gradients", False) for m in monitors)
        self._lags = ranks.device.type == "cuda" and not waits
        self._pending: _Pending | None = None
        self._stop_agreed = False
        self._evaluated_at = -1
        self._last_loss = math.nan
        self._clock = Clock()

    # --- the outline -----------------------------------------------------------------------------

    def fit(self) -> TrainResult:
        """Train up to `max_duration`, evaluating and saving on the way and at the end.

        SIGTERM and a first SIGINT end the run after the step at hand, with a checkpoint where there
        is a save folder, by SystemExit(143) and KeyboardInterrupt.

        Raises:
            ConfigError, CheckpointError: it cannot start, or a checkpoint cannot be written.
            DataError: the loader has nothing to give.
            TrainingError: the run cannot go on.
        """
        with self.signals, self._closing_loggers(), self._explaining_memory():
            self.progress = self.saving.start()
            self.saving.watch(self.monitors)
            if self.best is not None:
                self.saving.follow(self.best)
            self._clock.start(self.progress.seconds)
            self._start_loggers()
            self.has_started = True
            self.model.train()
            if self.saving.owes_evaluation:
                self.evaluate()
            saves = False
            for step, ends_epoch, waited in self._steps():
                before = replace(self.progress)
                self._train_step(step, ends_epoch, waited)
                saves = self._is_due(self.config.save_interval, before)
                self.saving.owes_evaluation = self._is_due(self.config.eval_interval, before)
                if self._stop_agreed or self.is_done:
                    break
                if self.saving.owes_evaluation:
                    self.evaluate()
                if saves:
                    self._save()
            return self._finish(saves)

    def _train_step(self, step: Step, ends_epoch: bool, waited: float) -> None:
        num_targets, num_tokens = self._agree_on(step)
        self._set_learning_rates()
        loss = self.backward(step.microbatches, num_targets, self.progress.batch)
        grad_norm = self._clip()
        self._advance(step, num_tokens, ends_epoch)
        self._update(loss, grad_norm)
        self._report()  # on the step before this one: the device is done with it by now
        rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        masked = any(batch.target_positions is not None for batch in step.microbatches)
        self._pending = _Pending(
            replace(self.progress),
            Reading(loss),
            None if grad_norm is None else Reading(grad_norm),
            rates,
            num_targets / max(num_tokens, 1) if masked else None,
            num_tokens,
            step.num_samples,
            waited,
        )
        if not self._lags:
            self._report()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Metrics of all evaluation loaders, named `metrics/LOADER/METRIC`; logged too."""
        self._report()
        self.model.eval()
        limit = self.config.eval_subset_num_batches
        self.metrics = {}
        for name, (loader, new_metric) in self.eval_loaders.items():
            metric = new_metric()
            for step in islice(loader.steps(0), None if limit == -1 else limit):
                for batch in step.microbatches:
                    moved = batch.to(self.ranks.device)
                    metric.update(self.backward.forward(moved, return_logits=True), moved)
            scores = metric.compute(self.ranks)
            self.metrics |= {f"metrics/{name}/{key}": value for key, value in scores.items()}
        self.model.train()
        self._evaluated_at = self.progress.batch
        self.saving.owes_evaluation = False
        self._log(self.metrics, self.progress)
        if self.best is not None and self.best.add(self.metrics, self.progress) and self.best.keep:
            self.saving.save(self.progress, keep=True)
        self._clock.skip()
        return self.metrics

    def _save(self) -> None:
        self._report()
        self.saving.save(self.progress)
        self._clock.skip()

    def _finish(self, saves: bool) -> TrainResult:
        """Evaluate, then save (`saves`: the interval asks for it), and say how it went."""
        self._report()
        self.backward.release()
        stopped = self._stop_agreed and not self.is_done
        if not stopped and self._evaluated_at != self.progress.batch:
            self.evaluate()
        if saves or self.config.save_at_end or stopped:
            self.saving.save(self.progress)
        checkpoint = self.saving.close()
        self._log_checkpoint()
        if stopped:
            self.signals.leave()
        if self.best is not None and self.best.keep and self.best.evaluations:
            checkpoint = self.saving.kept or checkpoint
            self.metrics = self.best.best["metrics"]
        return TrainResult(
            progress=self.progress,
            train_loss=self._last_loss,
            metrics=self.metrics,
            checkpoint=checkpoint,
            seconds=self._clock.seconds_of_this_call,
            tokens_per_second=self._clock.tokens_per_second,
        )

    # --- data and progress -----------------------------------------------------------------------

    @property
    def is_done(self) -> bool:
        """Whether `max_duration` is reached, or patience at its end."""
        exhausted = self.best is not None and self.best.is_exhausted
        return exhausted or self.progress.fraction_of(self.total) >= 1

    def _steps(self) -> Iterator[tuple[Step, bool, float]]:
        """Steps until the run is done; whether each ends its epoch; seconds lost waiting for it."""
        while not self.is_done:
            left = self._steps_left()
            epoch = self.progress.epoch
            steps = self.train_loader.steps(epoch, self.progress.sample_in_epoch)
            for number in range(1, left + 1):
                began = time.monotonic()
                step = next(steps, None)
                if step is None:
                    raise DataError(
                        f"The training data of epoch {epoch} ended after {number - 1} of {left} "
                        "batches. Check the data set for missing shards."
                    )
                waited = time.monotonic() - began
                if self._pending is not None and not self._pending.loss.is_here:
                    waited = 0.0  # the device has not: it is still at work on the step before
                yield step, number == left, waited
                if self.is_done:
                    return

    def _steps_left(self) -> int:
        """Steps left of this epoch; moves on to the next where there are none."""
        limit = self.config.train_subset_num_batches
        while True:
            progress = self.progress
            whole = self.train_loader.steps_in_epoch(progress.epoch)
            left = self.train_loader.steps_in_epoch(progress.epoch, progress.sample_in_epoch)
            if limit is not None and limit >= 0:
                whole, left = min(whole, limit), min(left, limit - progress.batch_in_epoch)
            self.batches_per_epoch = whole
            if left > 0:
                return left
            if progress.batch_in_epoch == 0:
                raise DataError(
                    f"An epoch of the training data ({self.train_loader.num_samples} samples) has "
                    "no whole batch. Lower global_train_batch_size, or set drop_last: false."
                )
            self._next_epoch()

    def _next_epoch(self) -> None:
        self.progress.epoch += 1
        self.progress.batch_in_epoch = self.progress.sample_in_epoch = 0

    def _advance(self, step: Step, num_tokens: int, ends_epoch: bool) -> None:
        progress = self.progress
        progress.batch += 1
        progress.sample += step.num_samples
        progress.token += num_tokens
        progress.batch_in_epoch += 1
        progress.sample_in_epoch = step.sample_in_epoch
        if ends_epoch:
            self._next_epoch()

    def _agree_on(self, step: Step) -> tuple[int, int]:
        """Targets and tokens of the global step; also the clock and signals that all follow."""
        targets, tokens, stop, self.progress.seconds = self.ranks.sum(
            [
                sum(batch.num_targets for batch in step.microbatches),
                sum(batch.num_tokens for batch in step.microbatches),
                self.signals.received is not None,
                self._clock.seconds_of_run if self.ranks.is_first else 0.0,
            ]
        )
        self._stop_agreed = stop > 0
        return int(targets), int(tokens)

    def _is_due(self, interval: str, before: Progress) -> bool:
        parsed = Duration.parse(interval)
        return is_due(parsed, before, self.progress, self.total, self.batches_per_epoch)

    # --- one step --------------------------------------------------------------------------------

    def _set_learning_rates(self) -> None:
        schedule = self.config.scheduler
        factor = lr_factor(schedule, self.progress, self.total, self.batches_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def _clip(self) -> Tensor | None:
        """Clip as configured. The norm of all gradients before that, where something needs it."""
        algorithms = self.config.algorithms
        clipping = algorithms.gradient_clipping if algorithms else None
        if clipping is None and not self.judges:
            return None
        self.scaler.unscale_(self.optimizer)
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if clipping and clipping.clipping_type == "norm":
            torch.nn.utils.clip_grads_with_norm_(params, clipping.clipping_threshold, norm)
        elif clipping:
            torch.nn.utils.clip_grad_value_(params, clipping.clipping_threshold)
        return norm

    def _update(self, loss: Tensor, grad_norm: Tensor | None) -> None:
        """Change the weights, unless a monitor judges that this step must not."""
        verdict = self._judge(loss, grad_norm) if self.judges else "go"
        if verdict == "go":
            self.scaler.step(self.optimizer)
        self.scaler.update()
        if verdict == "rewind":
            self.saving.rewind()

    def _judge(self, loss: Tensor, grad_norm: Tensor | None) -> str:
        norm = None if grad_norm is None else float(grad_norm)
        if norm is not None and self.scaler.is_enabled() and not math.isfinite(norm):
            norm = None  # too large a loss scale: the scaler leaves the step out and lowers it
        verdicts = {judge.judge(float(loss), norm, self.progress) for judge in self.judges}
        return next((verdict for verdict in ("rewind", "skip") if verdict in verdicts), "go")

    # --- reports ---------------------------------------------------------------------------------

    def _report(self) -> None:
        """Read the pending step's numbers, have the monitors look at them, and log."""
        step, self._pending = self._pending, None
        if step is None:
            return
        self._last_loss = step.loss.get()  # waits for the device
        norm = None if step.grad_norm is None else step.grad_norm.get()
        record = StepRecord(
            progress=step.progress,
            loss=self._last_loss,
            lr=step.lr,
            grad_norm=norm,
            num_tokens=step.num_tokens,
            num_samples=step.num_samples,
            seconds=self._clock.lap(step.num_tokens),
            data_wait_seconds=step.data_wait_seconds,
        )
        if not self.judges and not math.isfinite(record.loss):
            raise TrainingError(
                f"The loss is {record.loss} after batch {step.progress.batch}. Lower optimizer.lr, "
                "or let callbacks.health_checker skip such steps."
            )
        metrics = {"loss/train/total": record.loss}
        if step.mask_rate is not None:
            metrics["mask_rate"] = step.mask_rate
        if norm is not None:
            metrics["l2_norm/grad/global"] = norm
        for monitor in self.monitors:
            metrics |= monitor.after_step(record, self)
        self._log(metrics, record.progress)
        self._log_checkpoint()

    def _log_checkpoint(self) -> None:
        batch = self.saving.written_batch()
        if batch is not None:
            self._log({"checkpoint/batch": batch}, self.progress)

    def _log(self, metrics: Mapping[str, float], progress: Progress) -> None:
        if metrics:
            for logger in self.loggers:
                logger.log(metrics, replace(progress))

    def _start_loggers(self) -> None:
        for logger in self.loggers:
            start = getattr(logger, "start", None)
            if start is not None:
                start(replace(self.progress))

    @contextmanager
    def _explaining_memory(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"Out of memory after batch {self.progress.batch}, in an update or an evaluation. "
                "Lower device_eval_batch_size or device_train_microbatch_size."
            ) from error

    @contextmanager
    def _closing_loggers(self) -> Iterator[None]:
        try:
            yield
        finally:
            for logger in self.loggers:
                logger.close()
