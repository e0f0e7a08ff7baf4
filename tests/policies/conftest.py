"""One thread a process: tiny models gain nothing from more, and the suite runs in several processes."""

from __future__ import annotations

import contextlib

with contextlib.suppress(ImportError):
    import torch

    torch.set_num_threads(1)
