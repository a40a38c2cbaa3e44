"""Options that several commands share, and what is done with them."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeAlias

import typer

from onebase.client.channel import Security, TlsFileError, tls_of
from onebase.client.client import Client, connect
from onebase.client.terminal import print_note
from onebase.client.types import ChatMessage, Content
from onebase.client.waits import Wait

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


_said: ContextVar[Security | None] = ContextVar("onebase_security", default=None)
"""What --token and --tls-ca say in the command that runs."""


def open_client(server: str) -> Client:
    """A client of this server, with what --token and --tls-ca say; wrong usage if it cannot be one."""
    said = _said.get() or Security()
    try:
        return connect(server, token=said.token, tls=said.tls, wait=WAIT_SECONDS, on_wait=_note_wait)
    except TlsFileError as error:
        raise typer.BadParameter(str(error).removeprefix("tls is "), param_hint="--tls-ca") from None
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--server") from None


def _note_wait(wait: Wait) -> None:
    if max(wait.longest, wait.waited) > WAIT_SECONDS:  # else it is over, or told as an error, before it is read
        print_note(str(wait))


def add_security(command: Any) -> None:
    """Gives --token and --tls-ca to a command that takes a --server, and to its subcommands; nothing is said yet."""
    _said.set(None)
    for one in getattr(command, "commands", {}).values():
        add_security(one)
    if any("--server" in parameter.opts for parameter in command.params):
        command.params += _options()


def _options() -> list[Any]:
    app = typer.Typer(add_completion=False)
    app.command()(_security)
    return [one for one in typer.main.get_command(app).params if one.opts[0] in ("--token", "--tls-ca")]


def _keep_token(token: str) -> None:
    if token:
        try:
            _said.set(replace(_said.get() or Security(), token=token))
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--token") from None


def _keep_tls_ca(path: str) -> None:
    if path:
        _said.set(replace(_said.get() or Security(), tls=tls_of(path)))


def _security(
    token: Annotated[
        str,
        typer.Option(
            "--token",
            envvar="ONEBASE_TOKEN",
            show_default=False,
            help="Who asks, where the server wants to know. Others on this machine do not see it in the environment.",
            expose_value=False,
            callback=_keep_token,
        ),
    ] = "",
    tls_ca: Annotated[
        str,
        typer.Option(
            "--tls-ca",
            envvar="ONEBASE_TLS_CA",
            metavar="FILE",
            show_default=False,
            help='Talk TLS, and know the server by the certificates in this file (PEM); "system": by the system\'s.',
            expose_value=False,
            callback=_keep_tls_ca,
        ),
    ] = "",
) -> None:
    """The options that `add_security` gives."""
