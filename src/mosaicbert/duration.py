"""Time strings of the YAMLs: `10ba`, `286720000sp`, `0.06dur`, `1h30m`."""

import math
import re
from dataclasses import dataclass
from decimal import Decimal

from mosaicbert.errors import ConfigError

UNITS = {
    "ep": "epochs",
    "ba": "batches (optimizer steps)",
    "iter": "batches (optimizer steps)",
    "sp": "samples",
    "tok": "tokens",
    "sec": "seconds",
    "dur": "share of max_duration",
}
_CLOCK = re.compile(r"(?=\d)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_NUMBER = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(?:e(\d+))?\s*([a-z]+)")


def _finite(value: float, text: object, key: str) -> float:
    if not math.isfinite(value):
        raise ConfigError(f"{key}: {text!r:.60} is longer than anything.")
    return value


@dataclass(frozen=True, slots=True)
class Duration:
    """An amount of training in one unit of `UNITS`; whole for all but `dur` and `sec`."""

    value: float
    unit: str

    @classmethod
    def parse(cls, text: "str | int | Duration", key: str = "duration") -> "Duration":
        """Read a time string; a bare number counts batches.

        Raises:
            ConfigError: the string is no time string; names `key` and the units there are.
        """
        if isinstance(text, Duration):
            return text
        if isinstance(text, int) and not isinstance(text, bool):
            text = f"{text}ba"
        word = str(text).strip().lower().replace("_", "")
        clock = _CLOCK.fullmatch(word)
        if clock:
            days, hours, minutes, seconds = (float(part or 0) for part in clock.groups())
            value = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
            return cls(_finite(value, text, key), "sec")
        number = _NUMBER.fullmatch(word)
        if number is None or number[3] not in UNITS:
            raise ConfigError(
                f"{key}: {text!r} is no time string. Write a number and a unit, such as 10ba, 3ep, "
                f"286720000sp, 1000000tok, 0.06dur, 600sec or 1h30m (units: {', '.join(UNITS)})."
            )
        value, unit = _finite(float(f"{number[1]}e{number[2] or 0}"), text, key), number[3]
        unit = "ba" if unit == "iter" else unit
        if unit not in ("dur", "sec") and value != int(value):
            raise ConfigError(f"{key}: {text!r} must be a whole number of {UNITS[unit]}.")
        return cls(value, unit)

    def __str__(self) -> str:
        """As `parse` reads it: every digit, and no exponent."""
        if self.value == int(self.value):
            return f"{int(self.value)}{self.unit}"
        return f"{Decimal(repr(float(self.value))):f}{self.unit}"


@dataclass(slots=True)
class Progress:
    """How far a run is, in every unit. Counts are global (over all ranks)."""

    epoch: int = 0
    batch: int = 0
    sample: int = 0
    token: int = 0
    seconds: float = 0.0
    batch_in_epoch: int = 0
    sample_in_epoch: int = 0

    def count(self, unit: str) -> float:
        """Progress in one of the absolute units `ep ba sp tok sec`."""
        counts = {"ep": self.epoch, "ba": self.batch, "sp": self.sample, "tok": self.token}
        return self.seconds if unit == "sec" else counts[unit]

    def fraction_of(self, total: Duration, batches_per_epoch: int | None = None) -> float:
        """Share of `total` that is done; epochs count in parts where their length is known."""
        done = self.count(total.unit)
        if total.unit == "ep" and batches_per_epoch:
            done += self.batch_in_epoch / batches_per_epoch
        return done / total.value if total.value else 1.0
