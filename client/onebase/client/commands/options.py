"""Options that several commands share, and what is done with them."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

from onebase.client.client import Client, connect

DEFAULT_SERVER = "127.0.0.1:7070"
WAIT_SECONDS = 5.0
"""How long a command waits for its server: enough for one that restarts, and soon told if there is none."""

Server: TypeAlias = Annotated[
    str, typer.Option("--server", "-s", envvar="ONEBASE_SERVER", metavar="HOST:PORT", help="The server to ask.")
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Write JSON, one object per line.")]


def open_client(server: str) -> Client:
    """A client of this server; wrong usage if the address is none."""
    try:
        return connect(server, wait=WAIT_SECONDS)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--server") from None
