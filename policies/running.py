"""What a resumable run needs, whatever its engine: weights saved whole or not at all, and a Ctrl-C that saves first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors.torch import save_model
from torch import nn

#: (phase, step, name -> value): called at every logging step, and with no values before a checkpoint is written: what
#: was told until then should be kept now, because a run that goes on from there does not tell it again.
OnMetrics = Callable[[str, int, Mapping[str, float]], None]


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and what it had is saved; the same call goes on from there."""


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes a module's tensors as safetensors; a kill leaves the file as it was."""
    unfinished = path.with_suffix(".part")
    save_model(model, str(unfinished))
    unfinished.replace(path)


def fingerprint(parameters: Iterable[nn.Parameter]) -> list[tuple[float, float]]:
    """Sums that change when weights do."""
    return [(float(p.detach().double().sum()), float(p.detach().double().square().sum())) for p in parameters]


class StopRequest:
    """While it is open, Ctrl-C asks for a stop (`is_asked`); a second one stops at once."""

    def __init__(self) -> None:
        self.is_asked = False

    def __enter__(self) -> StopRequest:
        self._is_main = threading.current_thread() is threading.main_thread()
        if self._is_main:
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, number: int, frame: object) -> None:
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True

    def __exit__(self, *_: object) -> None:
        if self._is_main:
            signal.signal(signal.SIGINT, self._before)
