"""A global batch that grows at the start of a run."""

from dataclasses import dataclass

from mosaicbert.config.sections import BatchSizeWarmupConfig
from mosaicbert.duration import Duration
from mosaicbert.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GrowingBatch:
    """Samples of the batch after so many of the run: `start`, twice, three times that, ... `full`.

    Each size below `full` holds for the same number of the first `t_warmup` samples. The size
    follows from the position alone, so a resumed run goes on with it on any number of ranks.
    """

    start: int
    full: int
    t_warmup: int

    def __call__(self, samples_before: int) -> int:
        """Size of the batch that `samples_before` samples of the run precede."""
        if samples_before >= self.t_warmup:
            return self.full
        times = self.full // self.start
        return self.start * (1 + samples_before * (times - 1) // self.t_warmup)


def growing_batch(config: BatchSizeWarmupConfig, full: int, max_duration: Duration) -> GrowingBatch:
    """The batch size that `batch_size_warmup` describes, up to `full`.

    Raises:
        ConfigError: `start` does not divide `full`, or the warm-up's samples cannot be told.
    """
    if full % config.start:
        raise ConfigError(
            f"batch_size_warmup.start: {config.start} does not divide global_train_batch_size: "
            f"{full}. Batches grow by `start` at a time."
        )
    length = Duration.parse(config.t_warmup, "batch_size_warmup.t_warmup")
    if length.unit == "dur" and max_duration.unit == "sp":
        length = Duration(int(length.value * max_duration.value), "sp")
    if length.unit != "sp":
        raise ConfigError(
            f"batch_size_warmup.t_warmup: {length} of a run of {max_duration} is not known in "
            "samples while batches grow. Give it in samples, such as 1000000sp, or as a share "
            "(0.1dur) of a max_duration in samples."
        )
    return GrowingBatch(config.start, full, int(length.value))
