"""What all tests share."""

from __future__ import annotations

import signal

# A shell that starts CI in the background makes it ignore Ctrl-C, and every process that it starts inherits that; the
# tests that interrupt a process need the ordinary behaviour.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
