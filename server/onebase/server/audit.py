"""The audit log: one line of JSON for each call that changes something, or that is refused.

Rename the file to rotate it: the next line begins a new one. What is written is who, what and how it ended; never a
token, a session's id, a text or a number of a request.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from onebase.server.identity import Caller
from onebase.server.methods import RULES

log = logging.getLogger(__name__)

_ADAPTER_FIELDS = ("name", "adapter", "ppo_adapter_name", "reference")
_MAX_SHOWN = 128
_OPEN_SESSION = "/onebase.v1.SessionService/OpenSession"  # whoever repeats its request_id is told the session's id


@dataclass
class Record:
    """What is known of a call by its end."""

    method: str
    caller: Caller | None = None
    """None until it is known."""
    request: Any = None
    """The message, or the first one of a stream; None until it is parsed."""
    outcome: str = "OK"
    reason: str = ""
    began: float = field(default_factory=time.monotonic)


class _File(logging.handlers.WatchedFileHandler):
    """Begins a new file, its owner's alone, where the old one was renamed; what fails is raised."""

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding="utf-8", opener=_private)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802
        raise  # noqa: PLE0704  (logging calls this where it has caught an error)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class AuditLog:
    """Writes records to a file; without a path it writes none.

    A call whose line cannot be written is answered all the same: it has had its effect, and its client must know. The
    server's own log says when lines begin to be lost, and how many were when there are lines again.

    Args:
        path: appended to, made readable by its owner alone.
        clock: seconds since 1970.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._path = path
        self._handler: logging.Handler | None = None if path is None else _File(path)
        self._lost = 0
        """Lines that could not be written since the last one that was."""

    def write(self, record: Record) -> None:
        """One line, if the call changed something or was refused; never raises."""
        if self._handler is None:
            return
        rule = RULES.get(record.method)
        if record.outcome == "OK" and not (rule and rule.changes):
            return
        try:
            line = json.dumps(self._line(record), ensure_ascii=True)
            self._handler.handle(logging.LogRecord("onebase.audit", logging.INFO, "", 0, line, None, None))
        except Exception as error:  # whatever it is, the call is over and wants its answer
            if not self._lost:
                log.error("audit_log %s cannot be written, and calls go on without it: %s", self._path, error)
            self._lost += 1
        else:
            if self._lost:
                log.warning("audit_log %s is written again; %d lines were lost", self._path, self._lost)
            self._lost = 0

    def close(self) -> None:
        """Closes the file."""
        if self._handler is not None:
            with contextlib.suppress(OSError):  # a full disk: `write` has said so
                self._handler.close()

    def _line(self, record: Record) -> dict[str, object]:
        who = record.caller
        return {
            "time": round(self._clock(), 3),
            "tenant": who.tenant if who else "",
            "token": who.token if who else "",
            "method": record.method[:_MAX_SHOWN],
            "adapter": _adapter(record.request),
            "request_id": "" if record.method == _OPEN_SESSION else _text(record.request, "request_id"),
            "outcome": record.outcome,
            "reason": record.reason,
            "milliseconds": round((time.monotonic() - record.began) * 1000, 1),
        }


def _adapter(request: Any) -> str:
    """The adapter that a request names, whatever its field is called; of an upload, its header's."""
    return next((text for name in _ADAPTER_FIELDS if (text := _text(request, name))), "")


def _text(request: Any, name: str) -> str:
    header = getattr(request, "header", None)
    value = getattr(request if header is None else header, name, "")
    return value[:_MAX_SHOWN] if isinstance(value, str) else ""
