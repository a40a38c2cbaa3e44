"""`onebase adapters`: list, load, save, upload, download and delete adapters."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.table import Table
from rich.text import Text

from onebase.client.codec.values import KINDS, POOLINGS
from onebase.client.commands.options import DEFAULT_SERVER, Json, Server, open_client
from onebase.client.terminal import console, human_bytes, human_count, print_json
from onebase.client.types import Adapter, AdapterKind, Pooling, SavedAdapter

adapters = typer.Typer(add_completion=False, rich_markup_mode="rich", invoke_without_command=True)

OwnServer = Annotated[str | None, typer.Option("--server", "-s", metavar="HOST:PORT", help="The server to ask.")]
Name = Annotated[str, typer.Argument(help="The adapter's name on the server.")]
Directory = Annotated[
    str, typer.Argument(metavar="PATH", help="A directory on the server, under one of its roots, in PEFT's format.")
]
Kind = Annotated[str, typer.Option("--kind", "-k", metavar="KIND", help=f"What it is for: {', '.join(KINDS)}.")]

LocalDirectory = Annotated[
    Path, typer.Argument(metavar="PATH", help="A directory on this machine, in PEFT's format.", file_okay=False)
]
ValueHead = Annotated[
    bool, typer.Option("--value-head", help="Give a policy or critic that has none a fresh value head.")
]
Replace = Annotated[bool, typer.Option("--replace", help="Put it in the place of one of that name.")]
AppendEos = Annotated[
    bool | None,
    typer.Option(
        "--append-eos/--no-append-eos",
        help="Whether an end-of-sequence token belongs behind what a reward reads, as it was trained.",
    ),
]
Rule = Annotated[
    str | None,
    typer.Option("--pooling", metavar="RULE", help=f"Where a reward's score is read: {' or '.join(POOLINGS)}."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


@adapters.callback()
def list_adapters(ctx: typer.Context, server: Server = DEFAULT_SERVER, as_json: Json = False) -> None:
    """List the adapters on the base; load, save, upload, download and delete them.

    [bold]Examples[/bold]

      onebase adapters
      onebase adapters load helpful rewards/helpful --kind reward
      onebase adapters save policy_1 policies/policy_1 --overwrite
      onebase adapters upload policy_2 ./trained --replace
      onebase adapters download policy_1 ./policy_1
      onebase adapters delete policy_1
    """
    ctx.obj = server
    if ctx.invoked_subcommand is not None:
        return
    with open_client(server) as client:
        there = client.adapters()
    if as_json:
        for adapter in there:
            print_json({**asdict(adapter), "total_bytes": adapter.total_bytes})
    else:
        console().print(adapters_table(there))


def adapters_table(there: list[Adapter] | tuple[Adapter, ...]) -> Table:
    """A row for each adapter. "training" is the memory that gradients, moments and old versions take of the whole."""
    table = Table(title=f"adapters: {len(there)}", title_justify="left")
    table.add_column("name", overflow="fold")
    table.add_column("kind", no_wrap=True)
    table.add_column("head", overflow="fold")
    for heading in ("version", "rank", "params", "memory", "training"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("leased", no_wrap=True)
    for adapter in there:
        training = adapter.gradient_bytes + adapter.optimizer_bytes + adapter.old_version_bytes
        table.add_row(
            Text(adapter.name),
            adapter.kind,
            _head(adapter),
            str(adapter.version),
            str(adapter.lora.rank),
            human_count(adapter.parameter_count),
            human_bytes(adapter.total_bytes) if adapter.resident else "on disk",
            human_bytes(training) if training else "-",
            "yes" if adapter.leased else "-",
        )
    return table


def _head(adapter: Adapter) -> str:
    """Its head and how it is read, such as "value", "score", "3 scores, eos, not pad"."""
    if not adapter.num_labels:
        return "value" if adapter.value_head else "-"
    scores = "score" if adapter.num_labels == 1 else f"{adapter.num_labels} scores"
    eos = {None: "", True: ", eos", False: ", no eos"}[adapter.append_eos]
    rule = ", not pad" if adapter.pooling == "last_not_pad" else ""
    return f"{scores}{eos}{rule}"


@adapters.command()
def load(
    ctx: typer.Context,
    name: Name,
    path: Directory,
    kind: Kind = "policy",
    value_head: ValueHead = False,
    replace: Replace = False,
    with_optimizer: Annotated[
        bool, typer.Option("--with-optimizer", help="Also read the AdamW moments saved with it.")
    ] = False,
    append_eos: AppendEos = None,
    pooling: Rule = None,
    server: OwnServer = None,
) -> None:
    """Load an adapter that PEFT or this server has saved.

    [bold]Examples[/bold]

      onebase adapters load helpful rewards/helpful --kind reward
      onebase adapters load policy_1 policies/policy_1 --value-head
      onebase adapters load harmless rewards/harmless --kind reward --no-append-eos
    """
    with open_client(server or ctx.obj) as client:
        adapter = client.load_adapter(
            name,
            path,
            kind=_checked(kind),
            value_head=value_head,
            replace=replace,
            with_optimizer=with_optimizer,
            append_eos=append_eos,
            pooling=_checked_rule(pooling),
        )
    typer.echo(_told("loaded", adapter))


@adapters.command()
def upload(
    ctx: typer.Context,
    name: Name,
    path: LocalDirectory,
    kind: Kind = "policy",
    value_head: ValueHead = False,
    replace: Replace = False,
    with_optimizer: Annotated[
        bool, typer.Option("--with-optimizer", help="Also send the AdamW moments saved with it.")
    ] = False,
    append_eos: AppendEos = None,
    pooling: Rule = None,
    server: OwnServer = None,
) -> None:
    """Send an adapter of this machine to the server: what PEFT's save_pretrained wrote.

    [bold]Examples[/bold]

      onebase adapters upload policy_2 ./trained --replace
      onebase adapters upload helpful ./reward --kind reward
    """
    with open_client(server or ctx.obj) as client:
        adapter = client.upload_adapter(
            name,
            path,
            kind=_checked(kind),
            value_head=value_head,
            replace=replace,
            with_optimizer=with_optimizer,
            append_eos=append_eos,
            pooling=_checked_rule(pooling),
        )
    typer.echo(_told("uploaded", adapter))


def _checked(kind: str) -> AdapterKind:
    if kind not in KINDS:
        raise typer.BadParameter(f"must be one of {', '.join(KINDS)}, not {kind!r}", param_hint="--kind")
    return cast("AdapterKind", kind)


def _checked_rule(pooling: str | None) -> Pooling | None:
    if pooling not in (None, *POOLINGS):
        raise typer.BadParameter(f"must be one of {', '.join(POOLINGS)}, not {pooling!r}", param_hint="--pooling")
    return pooling


def _told(done: str, adapter: Adapter) -> str:
    return f"{done} {adapter.name}, {adapter.kind}, version {adapter.version}, {human_bytes(adapter.total_bytes)}"


@adapters.command()
def save(
    ctx: typer.Context,
    name: Name,
    path: Directory,
    with_optimizer: Annotated[
        bool, typer.Option("--with-optimizer", help="Also write the AdamW moments, to go on training from there.")
    ] = False,
    overwrite: Overwrite = False,
    merged: Annotated[
        bool,
        typer.Option(
            "--merged",
            help="Write the base with the adapter merged into it, as a transformers model with its tokenizer. A value "
            "head is not part of it.",
        ),
    ] = False,
    server: OwnServer = None,
) -> None:
    """Save an adapter on the server, in PEFT's format or merged into the base.

    [bold]Examples[/bold]

      onebase adapters save policy_1 policies/policy_1 --overwrite
      onebase adapters save policy_1 models/policy_1 --merged
    """
    with open_client(server or ctx.obj) as client:
        saved = client.save_adapter(name, path, with_optimizer=with_optimizer, overwrite=overwrite, merged=merged)
    typer.echo(_written("saved", saved))


@adapters.command()
def download(
    ctx: typer.Context,
    name: Name,
    path: LocalDirectory,
    with_optimizer: Annotated[
        bool, typer.Option("--with-optimizer", help="Also write the AdamW moments, to go on training from there.")
    ] = False,
    overwrite: Overwrite = False,
    server: OwnServer = None,
) -> None:
    """Write an adapter to this machine, in PEFT's format.

    [bold]Example[/bold]

      onebase adapters download policy_1 ./policy_1 --overwrite
    """
    with open_client(server or ctx.obj) as client:
        saved = client.download_adapter(name, path, with_optimizer=with_optimizer, overwrite=overwrite)
    typer.echo(_written("downloaded", saved))


def _written(done: str, saved: SavedAdapter) -> str:
    return f"{done} {saved.adapter.name} version {saved.adapter.version} to {saved.path}, {human_bytes(saved.bytes)}"


@adapters.command()
def delete(
    ctx: typer.Context,
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    server: OwnServer = None,
) -> None:
    """Forget an adapter and free its memory. What was not saved is lost.

    [bold]Example[/bold]

      onebase adapters delete policy_1
    """
    if not yes:
        typer.confirm(f"Forget {name}? What was not saved is lost.", abort=True)
    with open_client(server or ctx.obj) as client:
        client.delete_adapter(name)
    typer.echo(f"deleted {name}")
