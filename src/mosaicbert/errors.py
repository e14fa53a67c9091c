"""The errors this package raises for its users' mistakes and the world's.

MosaicBertError
├── ConfigError      a YAML, a command line or an argument says something impossible
├── DataError        a data set, shard, file or store is missing, damaged or of another form
├── CheckpointError  a checkpoint is missing, damaged, foreign or of another shape
└── TrainingError    a run cannot go on (a rank died, the loss is NaN, memory ran out)

Each message says what is wrong, where (key, file, shard, line) and what to do. The command line
prints the message alone, without a traceback, and exits with 2 (`TrainingError`: with 1).
`assert` is for our own mistakes.
"""

import difflib
from collections.abc import Iterable


class MosaicBertError(Exception):
    """What is wrong, where, and what to do."""

    exit_code = 2


class ConfigError(MosaicBertError):
    """A setting that cannot be."""


class DataError(MosaicBertError):
    """Data that is missing, damaged or of another form than expected."""


class CheckpointError(MosaicBertError):
    """A checkpoint that is missing, damaged, foreign or of another shape."""


class TrainingError(MosaicBertError):
    """A run that cannot go on."""

    exit_code = 1


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`' Did you mean "shuffle"?'` for a near miss, an empty string for none."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f' Did you mean "{near[0]}"?' if near else ""
