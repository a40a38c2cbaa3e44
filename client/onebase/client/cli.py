"""The `onebase` command. Its subcommands come from the packages that are installed: entries of `onebase.commands`."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from onebase.client.commands.options import add_security
from onebase.client.errors import OnebaseError
from onebase.client.terminal import print_error

GROUP = "onebase.commands"
EXTRAS = {"onebase.server": "server", "onebase.trainer": "trainer"}
"""The extra that brings what a package needs."""
INTERRUPTED = 130


class Commands(TyperGroup):
    """Loads a subcommand when it is asked for, so that one that is slow or broken troubles no other."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        """The names of all subcommands."""
        return sorted(_entries())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        """The subcommand of this name; one that tells what to install if its packages are not there."""
        entry = _entries().get(cmd_name)
        if entry is None:
            return None
        try:
            loaded = entry.load()
        except ModuleNotFoundError as error:
            return _as_command(cmd_name, _stand_in(entry, error))
        return _as_command(cmd_name, loaded)

    def invoke(self, ctx: Any) -> Any:
        """Runs the subcommand; what can go wrong is told in one line."""
        try:
            return super().invoke(ctx)
        except OnebaseError as error:
            print_error(_line(error) + _way_in(error, ctx.invoked_subcommand))
            raise typer.Exit(1) from None
        except ModuleNotFoundError as error:
            entry = _entries().get(ctx.invoked_subcommand or "")
            if entry is None or (error.name or "").startswith("onebase"):
                raise
            print_error(_what_is_missing(entry, error))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _as_command(name: str, loaded: Any) -> Any:
    """A function or a Typer app as a subcommand."""
    if isinstance(loaded, typer.Typer):
        command = typer.main.get_command(loaded)
    else:
        single = typer.Typer(add_completion=False, rich_markup_mode="rich")
        single.command(name)(loaded)
        command = typer.main.get_command(single)
    command.name = name
    add_security(command)
    return command


def _what_is_missing(entry: EntryPoint, error: ModuleNotFoundError) -> str:
    sentence = f"`onebase {entry.name}` needs the package {error.name}, which is not installed"
    return f"{sentence}: {remedy}" if (remedy := _remedy(entry)) else sentence


def _remedy(entry: EntryPoint) -> str:
    extra = EXTRAS.get(".".join(entry.module.split(".")[:2]))
    return f"pip install 'onebase[{extra}]'" if extra else ""


def _stand_in(entry: EntryPoint, error: ModuleNotFoundError) -> typer.Typer:
    """In the place of a command whose packages are not there: shows up in the help, and says what to install."""
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    remedy = _remedy(entry) or f"needs the package {error.name}"
    sentence = _what_is_missing(entry, error)

    @app.command(
        help=f"Not installed here: {remedy}".replace("[", r"\["),
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def stand_in(ctx: typer.Context) -> None:  # noqa: ARG001
        print_error(sentence)
        raise typer.Exit(1)

    return app


def _line(error: OnebaseError) -> str:
    aside = [part for part in (error.reason, error.field and f"field {error.field}") if part]
    return f"{error} ({', '.join(aside)})" if aside else str(error)


def _way_in(error: OnebaseError, command: str | None) -> str:
    """How a command is given the token that a server misses; the server's words are for programs."""
    if error.reason not in ("TOKEN_MISSING", "TOKEN_UNKNOWN", "TOKEN_EXPIRED"):
        return ""
    flag = "" if command == "train" else ", or --token"  # train's flags are settings, which are logged
    return f"; `onebase {command}` takes its token from ONEBASE_TOKEN{flag}"


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"onebase {version('onebase')}")
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)


@app.callback()
def onebase(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """One base model in memory, many policies: serve it, train on it, ask it.

    [bold]Start here[/bold]

      onebase serve MODEL --reward helpful=DIR   # one server, one base
      onebase train ppo.yaml                     # trainers, side by side
      onebase reward "The film was" " good."     # ask the reward model meanwhile
      onebase status --watch 2                   # look on

    Commands talk to 127.0.0.1:7070 unless --server or ONEBASE_SERVER says otherwise,
    with the token in ONEBASE_TOKEN and the certificates in ONEBASE_TLS_CA, if any.
    """


def main() -> None:
    """Runs the command line and exits: 0 done, 1 refused, 2 wrong usage, 130 interrupted."""
    app(prog_name="onebase")


if __name__ == "__main__":
    main()
