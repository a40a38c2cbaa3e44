"""`onebase serve`: settings from the command line, and what the server does told as it does it.

Torch and the rest of the server are imported when the command runs, so that `onebase --help` is quick.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape

from onebase.server import options as o

if TYPE_CHECKING:
    from onebase.server.app import Report
    from onebase.server.config import ServerConfig
    from onebase.server.jobs import AdapterFacts, BaseFacts
    from onebase.server.registry import Entry
    from onebase.server.successor import Restarts


def serve(
    model: o.Model,
    rewards: o.Rewards = None,
    policies: o.Policies = None,
    references: o.References = None,
    critics: o.Critics = None,
    reward_append_eos: o.RewardAppendEos = None,
    reward_pooling: o.RewardPooling = None,
    policy_rank: o.PolicyRank = 16,
    policy_alpha: o.PolicyAlpha = 32.0,
    roots: o.Roots = None,
    shared_roots: o.SharedRoots = None,
    host: o.Host = "127.0.0.1",
    port: o.Port = 7070,
    port_file: o.PortFile = None,
    drain_seconds: o.DrainSeconds = 30.0,
    stall_seconds: o.StallSeconds = 300.0,
    stall_restart_seconds: o.StallRestartSeconds = 0.0,
    max_upload_bytes: o.MaxUploadBytes = 4 * 2**30,
    state: o.State = None,
    checkpoints: o.Checkpoints = "",
    adopt: o.Adopt = False,
    durability: o.Durability = "checkpoint",
    checkpoint_steps: o.CheckpointSteps = 0,
    checkpoint_seconds: o.CheckpointSeconds = 60.0,
    keep_checkpoints: o.KeepCheckpoints = 2,
    restore: o.Restore = None,
    evict_idle_seconds: o.EvictIdleSeconds = 600.0,
    adapter_memory: o.AdapterMemory = 0,
    device: o.Device = "auto",
    dtype: o.DType = "auto",
    quantization: o.Quantization = "none",
    threads: o.Threads = 0,
    max_context: o.MaxContext = 0,
    kv_slots: o.KvSlots = 32,
    kv_bytes: o.KvBytes = 0,
    step_tokens: o.StepTokens = 0,
    train_tokens: o.TrainTokens = 0,
    exact: o.Exact = "auto",
    kernels: o.Kernels = "auto",
    gradient_checkpointing: o.GradientCheckpointing = False,
    version_window: o.VersionWindow = 0,
    trust_remote_code: o.TrustRemoteCode = False,
    tokenizer: o.Tokenizer = "",
    chat_template: o.ChatTemplate = None,
    tls_cert: o.TlsCert = None,
    tls_key: o.TlsKey = None,
    tls_client_ca: o.TlsClientCa = None,
    insecure: o.Insecure = False,
    tokens: o.TokensFile = None,
    audit_log: o.Audit = None,
    stream_idle_seconds: o.StreamIdle = 60.0,
    tenant_quota: o.TenantQuota = "",
    whole_quota: o.WholeQuota = "",
    verbose: o.Verbose = False,
) -> None:
    """Serve one base model with any number of adapters: policies to train, rewards, references.

    Every request names its adapters, so several trainers and reward queries share the one base in memory.

    Examples:

        onebase serve Qwen/Qwen3-0.6B --reward helpful=runs/reward --policy policy_1

        onebase serve ./base --reward r=./reward --policy p1 --policy p2=./sft --root ./checkpoints --port 7071

        onebase serve ./base --reward r=./reward --reward-append-eos r=no --policy p1 --critic c1=./reward

    Then, in other terminals:

        onebase train ppo.yaml

        onebase reward "How was the film?" "It was wonderful."

        onebase status

    Ctrl-C or SIGTERM stops it: work in flight is finished first, for up to --drain-seconds. If the engine crashes, a
    server with --state starts again by itself, on the same port; without it, or after 3 times in 10 minutes, it ends
    with code 70.
    """
    console = Console(highlight=False)
    from onebase.server.config import ConfigError, EngineConfig, Limits, Security, ServerConfig
    from onebase.server.errors import OnebaseError
    from onebase.server.flags import in_flags, quota, reward_sources, sources, state_config
    from onebase.server.log_lines import OneLine

    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    if verbose:
        logging.getLogger("onebase").setLevel(logging.DEBUG)
    try:
        engine = EngineConfig(
            model=model,
            device=device,
            dtype=dtype,
            quantization=quantization,
            threads=threads,
            max_context=max_context,
            kv_slots=kv_slots,
            kv_bytes=kv_bytes,
            step_tokens=step_tokens,
            train_tokens=train_tokens,
            exact=exact,
            kernels=kernels,
            gradient_checkpointing=gradient_checkpointing,
            version_window=version_window,
            trust_remote_code=trust_remote_code,
            tokenizer=tokenizer,
            chat_template=chat_template,
        )
        config = ServerConfig(
            engine=engine,
            host=host,
            port=port,
            port_file=port_file,
            rewards=reward_sources(rewards, reward_append_eos, reward_pooling),
            policies=sources("--policy", policies, with_path=False),
            references=sources("--reference", references, with_path=True),
            critics=sources("--critic", critics, with_path=False),
            roots=tuple(roots or ()),
            shared_roots=tuple(shared_roots or ()),
            state=state_config(
                state,
                durability,
                checkpoint_steps,
                checkpoint_seconds,
                keep_checkpoints,
                restore,
                checkpoints,
                adopt,
                evict_idle_seconds=evict_idle_seconds,
                adapter_memory=adapter_memory,
            ),
            limits=Limits(max_upload_bytes=max_upload_bytes),
            security=Security(
                tls_cert, tls_key, tls_client_ca, insecure, tokens, audit_log, stream_idle_seconds=stream_idle_seconds
            ),
            tenant_quota=quota("--tenant-quota", tenant_quota),
            quota=quota("--quota", whole_quota),
            drain_seconds=drain_seconds,
            stall_seconds=stall_seconds,
            stall_restart_seconds=stall_restart_seconds,
            policy_rank=policy_rank,
            policy_alpha=policy_alpha,
        )
        _run(config, console)
    except (ConfigError, OnebaseError) as error:
        said = in_flags(str(error)) if isinstance(error, ConfigError) else str(error)
        Console(stderr=True, highlight=False).print(f"[bold red]error[/] {escape(said)}", soft_wrap=True)
        raise typer.Exit(1) from None


def _run(config: ServerConfig, console: Console) -> None:
    from onebase.server.app import open_parts
    from onebase.server.app import serve as serve_parts
    from onebase.server.certificates import check_certificates
    from onebase.server.listening import check_address
    from onebase.server.process import spare_what_stays
    from onebase.server.successor import Restarts

    restarts = Restarts.inherited()
    config = restarts.keep_port(config)
    check_certificates(config.security)
    check_address(config)
    with console.status(f"Opening {escape(config.engine.model)} …"):
        parts = open_parts(config)
        spare_what_stays()
    console.print(_base_line(parts.worker.facts), soft_wrap=True)
    asyncio.run(serve_parts(parts, config, _report(config, restarts, console)))
    console.print("Stopped.")


def _report(config: ServerConfig, restarts: Restarts, console: Console) -> Report:
    from onebase.server.app import Report
    from onebase.server.successor import end

    def ready(port: int) -> None:
        address = f"{config.host}:{port}"
        flag = "" if address == "127.0.0.1:7070" else f" --server {address}"
        for warning in _warnings(config):
            console.print(f"[yellow]warning[/] {warning}", soft_wrap=True)
        console.print(f"[bold green]Serving[/] on [bold]{escape(address)}[/]; Ctrl-C stops it.", soft_wrap=True)
        console.print(f'[dim]Try: onebase status{flag} · onebase reward "PROMPT" "RESPONSE"{flag}[/]', soft_wrap=True)

    def draining() -> None:
        console.print(f"Stopping: work in flight may finish, for up to {config.drain_seconds:g} s.")

    return Report(
        adapter=lambda entry, seconds: console.print(_adapter_line(entry, seconds), soft_wrap=True),
        restored=lambda entry, seconds: console.print(_restored_line(entry, seconds), soft_wrap=True),
        damaged=lambda _name, error: console.print(f"  [bold red]damaged[/] {escape(str(error))}", soft_wrap=True),
        ready=ready,
        draining=draining,
        lost=lambda ticket, port: end(config, restarts, ticket, port),
    )


def _warnings(config: ServerConfig) -> list[str]:
    """What an operator should know of a server that other machines reach."""
    from onebase.server.config import is_loopback

    security = config.security
    if is_loopback(config.host):
        return []
    found = []
    if not security.tls:
        found.append("there is no TLS: what goes over the network, tokens too, can be read and changed on its way")
    if security.tokens is None and security.tls_client_ca is None:
        found.append("there are no tokens: whoever reaches this address may do everything; --tokens FILE asks for one")
    return found


def _base_line(facts: BaseFacts) -> str:
    checked = "checked, exact" if facts.exact else "checked"
    return (
        f"[bold]{escape(facts.model)}[/] {facts.architecture}, {facts.parameter_count:,} parameters in "
        f"{facts.precision} ({_size(facts.weights_bytes)}) on {facts.device}, context {facts.max_context}; {checked}"
    )


def _adapter_line(entry: Entry, seconds: float) -> str:
    facts = entry.facts
    head = "value head" if facts.value_head else _score_head(facts) if facts.num_labels else "no head"
    where = f"from {escape(entry.source)}" if entry.source else "fresh"
    return (
        f"  {facts.kind.value} [bold]{entry.name}[/]: rank {facts.lora.rank}, {head}, "
        f"{_size(facts.memory.weights)}, {where}, {seconds:.1f} s"
    )


def _restored_line(entry: Entry, seconds: float) -> str:
    return f"  {entry.kind.value} [bold]{entry.name}[/]: restored at version {entry.facts.version}, {seconds:.1f} s"


def _score_head(facts: AdapterFacts) -> str:
    """A reward's head and what is declared of it, such as "score head of 3, no eos, read at last_not_pad"."""
    from onebase.server.jobs import Pooling

    eos = {None: "", True: ", eos", False: ", no eos"}[facts.append_eos]
    rule = "" if facts.pooling is Pooling.LAST_TOKEN else f", read at {facts.pooling.value}"
    return f"score head of {facts.num_labels}{eos}{rule}"


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
