"""Log records of one line each, whatever a client has written into a name or a file.

Messages quote what clients say, and a line break in it would look like a record of the server's own; an escape
sequence would command the terminal that shows it.
"""

from __future__ import annotations

import logging
import re
from typing import Any

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class OneLine(logging.Formatter):
    """Spells out control characters in messages; a traceback's lines are indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The record's line."""
        return _CONTROL.sub(_spelled, super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """A traceback, whose last lines are the error's own words."""
        lines = super().formatException(ei).split("\n")
        return "\n".join(f"  {_CONTROL.sub(_spelled, line)}" for line in lines)


def _spelled(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()
