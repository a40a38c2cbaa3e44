"""`onebase token`: make, list and revoke the tokens that a server lets in; a running one sees each change at once."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from onebase.server.identity import Scope, tenant_problem
from onebase.server.names import problem
from onebase.server.tokens import Token, TokenFile, TokenFileError

token = typer.Typer(add_completion=False, rich_markup_mode="rich", no_args_is_help=True)

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST_DAYS = 3650
_ALL = "all"

Tokens = Annotated[
    Path,
    typer.Option(
        "--tokens",
        metavar="FILE",
        envvar="ONEBASE_TOKENS",
        help="The token file, as given to `onebase serve --tokens`.",
        dir_okay=False,
    ),
]
_DEFAULT = Path("onebase-tokens.json")


@token.callback()
def tokens() -> None:
    """Make, list and revoke the tokens that a server lets in.

    A server that was started with --tokens FILE reads that file again whenever it changes.

    [bold]Examples[/bold]

      onebase token create --scope all
      onebase token create --tenant red --scope reward,generate --adapter policy_1 --expires 30d
      onebase token list
      onebase token revoke 1f0c3a9b7d24
    """


@token.command()
def create(
    scope: Annotated[
        str,
        typer.Option(
            "--scope",
            metavar="SCOPES",
            help=f"What it may do, with commas between: {', '.join(one.value for one in Scope)}; or all.",
        ),
    ],
    tenant: Annotated[
        str,
        typer.Option(
            "--tenant",
            help="Whose it is: adapters and sessions belong to a tenant. `operator` is whoever runs the server.",
        ),
    ] = "default",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="NAME",
            help="The only policy or critic that it means, also one of the operator's; may be repeated. Without it: "
            "all of the tenant's.",
        ),
    ] = None,
    expires: Annotated[
        str, typer.Option("--expires", metavar="TIME", help="How long it is good for: 90m, 12h, 30d; or never.")
    ] = "never",
    path: Tokens = _DEFAULT,
) -> None:
    """Make a token, and print it: the only time that it is seen."""
    wrong = tenant_problem(tenant)
    if wrong:
        raise typer.BadParameter(f"{tenant!r} {wrong}", param_hint="--tenant")
    for name in adapter or ():
        if wrong := problem(name):
            raise typer.BadParameter(f"{name!r} {wrong}", param_hint="--adapter")
    with _Told():
        typer.echo(TokenFile(path).add(tenant, _scopes(scope), tuple(adapter or ()), _seconds(expires)))


@token.command("list")
def list_tokens(
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON, one object per line.")] = False,
    path: Tokens = _DEFAULT,
) -> None:
    """Show the tokens there are, without their secrets."""
    with _Told():
        there = list(TokenFile(path).read().values())
    if as_json:
        for one in there:
            print(json.dumps({**vars(one), "hash": None}))
        return
    table = Table(title=f"tokens: {len(there)}", title_justify="left")
    for heading in ("id", "tenant", "scopes", "adapters", "expires"):
        table.add_column(heading, overflow="fold")
    for one in there:
        table.add_row(one.id, one.tenant, ", ".join(one.scopes), ", ".join(one.adapters) or "all", _until(one))
    Console(highlight=False).print(table)


@token.command()
def revoke(
    token_id: Annotated[str, typer.Argument(metavar="ID", help="As `onebase token list` shows it.")],
    path: Tokens = _DEFAULT,
) -> None:
    """Forget a token; whoever comes with it is turned away from now on."""
    with _Told():
        TokenFile(path).revoke(token_id)
    typer.echo(f"revoked {token_id}")


class _Told:
    """What can go wrong with the file, in one line and exit code 1."""

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, TokenFileError | OSError):
            Console(stderr=True, highlight=False).print(f"[bold red]error[/] {error}", soft_wrap=True)
            raise typer.Exit(1) from None


def _scopes(text: str) -> tuple[Scope, ...]:
    if text == _ALL:
        return tuple(Scope)
    known = {one.value: one for one in Scope}
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}, all", param_hint="--scope")
    return tuple(dict.fromkeys(known[name] for name in names))


def _seconds(text: str) -> float | None:
    if text == "never":
        return None
    found = re.fullmatch(r"([1-9][0-9]{0,8})([smhd])", text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no time: give 90m, 12h, 30d or never", param_hint="--expires")
    seconds = int(found[1]) * _UNITS[found[2]]
    if seconds > _LONGEST_DAYS * _UNITS["d"]:
        raise typer.BadParameter(
            f"{text!r} is more than 10 years: give up to {_LONGEST_DAYS}d, or never", param_hint="--expires"
        )
    return float(seconds)


def _until(one: Token) -> str:
    if one.expires is None:
        return "never"
    over = " (over)" if one.expires <= time.time() else ""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(one.expires)) + over
