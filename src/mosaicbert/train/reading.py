"""Numbers on their way from the device to the host."""

import torch
from torch import Tensor


class Reading:
    """A scalar of the device that the host wants to know later.

    The copy is ordered at once. Were it ordered when the number is wanted, it would stand behind
    whatever the device has been given since, and the device would run dry while the host waits.
    """

    def __init__(self, value: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if value.device.type == "cuda":
            self._number = torch.empty_like(value, device="cpu", pin_memory=True)
            self._number.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._number = value

    @property
    def is_here(self) -> bool:
        """Whether the device is done with it and everything before it."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def get(self) -> float:
        """The number; waits for it."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._number)
