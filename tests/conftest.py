"""What all tests share: Ctrl-C works, also where the tests were started in the background."""

from __future__ import annotations

import signal

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell's background jobs ignore it, and so would their children
    signal.signal(signal.SIGINT, signal.default_int_handler)
