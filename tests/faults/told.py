"""What clients are told during the test that runs: refusals note themselves, a test notes the rest."""

from __future__ import annotations

from typing import Any

TOLD: list[str] = []
"""A code, and after a blank the reason if there is one; emptied before each test (`faults.plugin`)."""


def note(told: Any, reason: str = "") -> None:
    """Notes what a client saw.

    Args:
        told: a gRPC code or its name.
        reason: of the ErrorInfo; "" for what the transport says by itself.
    """
    TOLD.append(f"{getattr(told, 'name', told)} {reason}".strip())
