"""Which restores a start has to do: each that the settings ask for is done once.

A server starts again with the command line that it had: by itself after a crash, or because something watches it. A
restore that was done then again would take back what was trained, and answered, since the first. So the registry notes
what was done, with the transaction that does it; and forgets it at a start that does not ask for it any more, so that
the same may be asked for later.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from datetime import datetime

log = logging.getLogger(__name__)

KEY = "restores"
"""Under which the registry notes them."""


class Restores:
    """What a start goes back to.

    Args:
        asked: names of adapters and versions, as the settings have them; of one name the last counts.
        noted: what the registry has noted.
        clock: seconds since 1970.
    """

    def __init__(self, asked: Iterable[tuple[str, int]], noted: str, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        wanted, before = dict(asked), json.loads(noted or "{}")
        keys = {name: _key(name, version) for name, version in wanted.items()}
        self._done: dict[str, float] = {key: before[key] for key in keys.values() if key in before}
        self.due = {name: version for name, version in wanted.items() if keys[name] not in self._done}
        """What is to be done, by the name of the adapter."""

    @property
    def noted(self) -> str:
        """What the registry shall note now."""
        return json.dumps(self._done)

    def done(self, name: str) -> str:
        """Takes in that one which is due is done now; returns what the registry shall note with that."""
        self._done[_key(name, self.due.pop(name))] = self._clock()
        return self.noted

    def tell(self) -> None:
        """Says in the log which are not done again."""
        for key, when in self._done.items():
            at = datetime.fromtimestamp(when).astimezone().isoformat(sep=" ", timespec="seconds")
            log.warning(
                "restore %s was done at %s, and is not done again: versions made since then stay. Leave it out; to go "
                "back there once more, start once without it, and then with it",
                key,
                at,
            )


def _key(name: str, version: int) -> str:
    """A version of a name is never another's, so that says which adapter was meant."""
    return f"{name}={version}"
