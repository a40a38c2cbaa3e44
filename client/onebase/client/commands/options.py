"""Options that several commands share, and what is done with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypeAlias

import typer

from onebase.client.client import Client, connect
from onebase.client.types import ChatMessage, Content

DEFAULT_SERVER = "127.0.0.1:7070"
WAIT_SECONDS = 5.0
"""How long a command waits for its server: enough for one that restarts, and soon told if there is none."""

Server: TypeAlias = Annotated[
    str, typer.Option("--server", "-s", envvar="ONEBASE_SERVER", metavar="HOST:PORT", help="The server to ask.")
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Write JSON, one object per line.")]
Chat: TypeAlias = Annotated[
    bool, typer.Option("--chat", help="Put texts in a conversation: the user says the prompt, the assistant answers.")
]
System: TypeAlias = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="Begin the conversation with this; means --chat.")
]


@dataclass(frozen=True)
class Chatting:
    """Whether texts are messages of a conversation, and what that begins with. What is no text stays as it is."""

    on: bool = False
    begin: tuple[ChatMessage, ...] = ()

    @classmethod
    def of(cls, chat: bool, system: str | None) -> Chatting:
        """As `--chat` and `--system` say."""
        return cls(chat or system is not None, () if system is None else (ChatMessage("system", system),))

    def prompt(self, content: Content) -> Content:
        """What the user says."""
        return [*self.begin, ChatMessage("user", content)] if self.on and isinstance(content, str) else content

    def response(self, content: Content) -> Content:
        """What the assistant answers."""
        return [ChatMessage("assistant", content)] if self.on and isinstance(content, str) else content


def open_client(server: str) -> Client:
    """A client of this server; wrong usage if the address is none."""
    try:
        return connect(server, wait=WAIT_SECONDS)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--server") from None
