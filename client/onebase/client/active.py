"""Which adapter of a session is active, as its client has last heard it."""

from __future__ import annotations

import threading


class ActiveAdapter:
    """The name of the active adapter, kept in step with answers that arrive in any order.

    The answer to a call that only asked can be older than what another thread heard while it was on its way. So such
    a call notes, when it is sent, how much had been heard by then (`mark`), and its answer counts only if nothing came
    between. The answer to a call that made an adapter the active one always counts.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._heard = 0
        self._lock = threading.Lock()

    @property
    def mark(self) -> int:
        """How much has been heard so far."""
        return self._heard

    def hear(self, name: str, mark: int | None = None) -> None:
        """Takes over a name from an answer; with the `mark` of a call that only asked, if it is not outdated."""
        with self._lock:
            if mark is None or mark == self._heard:
                self.name = name
                self._heard += 1
