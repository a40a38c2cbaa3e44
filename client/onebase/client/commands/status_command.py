"""`onebase status`: what a server is doing."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from onebase.client.client import Client
from onebase.client.commands.adapters_command import adapters_table
from onebase.client.commands.options import DEFAULT_SERVER, Json, Server, open_client
from onebase.client.terminal import console, human_bytes, human_seconds, print_json
from onebase.client.types import ServerInfo, ServerStatus


def status(
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
    watch: Annotated[
        float | None, typer.Option("--watch", "-w", min=0.1, metavar="SECONDS", help="Look again, until Ctrl-C.")
    ] = None,
) -> None:
    """Show what the server is doing: sessions, adapters, memory, queues, tokens per second.

    [bold]Examples[/bold]

      onebase status
      onebase status --watch 2
      onebase status --server gpu-1:7070 --json
    """
    with open_client(server) as client:
        info = client.info()
        if as_json:
            _write_json(client, info, watch)
        else:
            _write_tables(client, info, watch)


def _write_json(client: Client, info: ServerInfo, watch: float | None) -> None:
    while True:
        print_json(record(info, client.status()))
        if watch is None:
            return
        time.sleep(watch)


def _write_tables(client: Client, info: ServerInfo, watch: float | None) -> None:
    screen = console()
    if watch is None or not screen.is_terminal:
        screen.print(tables(info, client.status()))
        while watch is not None:
            time.sleep(watch)
            screen.print(tables(info, client.status()))
        return
    with Live(tables(info, client.status()), console=screen, auto_refresh=False) as live:
        while True:
            time.sleep(watch)
            live.update(tables(info, client.status()), refresh=True)


def record(info: ServerInfo, now: ServerStatus) -> dict[str, Any]:
    """The status as an object for JSON."""
    return {"version": info.version, "base": asdict(info.base), **asdict(now)}


def tables(info: ServerInfo, now: ServerStatus) -> Group:
    """The status for people."""
    return Group(_server_table(info, now), _sessions_table(now), adapters_table(now.adapters), _queues_table(now))


def _server_table(info: ServerInfo, now: ServerStatus) -> Table:
    table = Table(show_header=False, title=Text(f"onebase {info.version}"), title_justify="left")
    base = info.base
    kept = base.dtype if base.quantization == "none" else f"{base.quantization} with {base.dtype} products"
    exact = ", exact" if base.exact else ""
    chat = ", chat template" if base.chat_template else ""
    table.add_row("base", Text(f"{base.model} ({base.architecture}, {kept} on {base.device}{exact}{chat})"))
    table.add_row("up for", f"{human_seconds(now.uptime_seconds)}, {now.engine_steps:,} engine steps")
    table.add_row(
        "memory",
        f"{human_bytes(now.rss_bytes)} resident, {human_bytes(now.peak_rss_bytes)} at most; "
        f"base {human_bytes(now.base_bytes)}, key-value cache {human_bytes(now.kv_cache_bytes)} "
        f"({now.kv_slots_used} of {now.kv_slots} slots used)",
    )
    table.add_row(
        "tokens per second",
        f"{now.generated_tokens_per_second:,.1f} generated, {now.scored_tokens_per_second:,.1f} scored, "
        f"{now.trained_tokens_per_second:,.1f} trained on",
    )
    return table


def _sessions_table(now: ServerStatus) -> Table:
    table = Table(title=f"sessions: {len(now.sessions)}", title_justify="left")
    for heading in ("label", "active adapter", "leases"):
        table.add_column(heading)
    for heading in ("requests", "age", "idle"):
        table.add_column(heading, justify="right")
    for session in now.sessions:
        table.add_row(
            Text(session.label or "-"),
            Text(session.ppo_adapter_name or "-"),
            Text(", ".join(session.leases) or "-"),
            str(session.requests_in_flight),
            human_seconds(session.age_seconds),
            human_seconds(session.idle_seconds),
        )
    return table


def _queues_table(now: ServerStatus) -> Table:
    table = Table(title="queues", title_justify="left")
    table.add_column("work")
    for heading in ("waiting", "running"):
        table.add_column(heading, justify="right")
    for queue in now.queues:
        table.add_row(Text(queue.work), str(queue.waiting), str(queue.running))
    return table
