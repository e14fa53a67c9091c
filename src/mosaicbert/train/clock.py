"""What a run takes, by the wall clock."""

import math
import time


class Clock:
    """Wall clock of a run: as a whole, of this call, and of its steps alone."""

    def __init__(self) -> None:
        self._earlier = 0.0
        self._began = self._mark = time.monotonic()
        self._num_laps = 0
        self._tokens = 0
        self._seconds = 0.0

    def start(self, earlier_seconds: float) -> None:
        """Begin; a resumed run adds to what it took before."""
        self._earlier = earlier_seconds
        self._began = self._mark = time.monotonic()

    @property
    def seconds_of_this_call(self) -> float:
        """Since `start`."""
        return time.monotonic() - self._began

    @property
    def seconds_of_run(self) -> float:
        """With what earlier calls took."""
        return self._earlier + self.seconds_of_this_call

    @property
    def tokens_per_second(self) -> float:
        """Over the steps' own seconds, without the first, which compiles; NaN where it was all."""
        return self._tokens / self._seconds if self._seconds else math.nan

    def skip(self) -> None:
        """What went by since the last lap was no step."""
        self._mark = time.monotonic()

    def lap(self, num_tokens: int) -> float:
        """Seconds of the step that ends now."""
        now = time.monotonic()
        seconds, self._mark = now - self._mark, now
        self._num_laps += 1
        if self._num_laps > 1:
            self._tokens += num_tokens
            self._seconds += seconds
        return seconds
