"""What the commands write, and where: results to stdout, everything about them to stderr."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import typer
from rich.console import Console
from rich.text import Text


def console() -> Console:
    """Where tables go."""
    return Console()


def print_error(message: str) -> None:
    """One line to stderr, red on a terminal."""
    Console(stderr=True).print(Text(f"error: {' '.join(message.split())}", style="red"), soft_wrap=True)


def print_note(message: str) -> None:
    """One line about a result to stderr, dim on a terminal."""
    Console(stderr=True).print(Text(message, style="dim"), soft_wrap=True)


def print_json(record: Mapping[str, Any]) -> None:
    """One object on a line of its own, flushed."""
    typer.echo(json.dumps(record, ensure_ascii=False))


def human_bytes(count: int) -> str:
    """A size for people, in powers of 1024: "1.4 GiB"."""
    if count < 1024:
        return f"{count} B"
    size = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"


def human_count(count: int) -> str:
    """A number for people, in powers of 1000: "14.9k", "1.5B"."""
    if count < 1000:
        return str(count)
    size = float(count)
    for unit in ("k", "M"):
        size /= 1000
        if size < 1000:
            return f"{size:.1f}{unit}"
    return f"{size / 1000:.1f}B"


def human_seconds(seconds: float) -> str:
    """A time for people: "42 s", "3 min 5 s", "2 h 7 min", "3 d 4 h"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"
