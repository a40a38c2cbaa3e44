"""`onebase serve`: settings from the command line, and what the server does told as it does it.

Torch and the rest of the server are imported when the command runs, so that `onebase --help` is quick.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from onebase.server.app import Report
    from onebase.server.config import ServerConfig
    from onebase.server.jobs import AdapterFacts, BaseFacts
    from onebase.server.registry import Entry
    from onebase.server.successor import Restarts

_ADAPTERS, _ENGINE, _NETWORK, _STATE = "Adapters", "Engine", "Network and files", "Durability"
_SECURITY = "Security"

Model = Annotated[str, typer.Argument(help="The base model: a hub id or a directory.", show_default=False)]
Rewards = Annotated[
    list[str] | None,
    typer.Option(
        "--reward",
        metavar="NAME=PATH",
        help="A reward adapter (PEFT, SEQ_CLS). May be repeated.",
        rich_help_panel=_ADAPTERS,
    ),
]
RewardAppendEos = Annotated[
    list[str] | None,
    typer.Option(
        "--reward-append-eos",
        metavar="NAME=yes|no",
        help="Whether an end-of-sequence token belongs behind what this reward reads, as it was trained. Without it: "
        "what its onebase.json says, or else yes for texts, no for token ids. May be repeated.",
        rich_help_panel=_ADAPTERS,
    ),
]
RewardPooling = Annotated[
    list[str] | None,
    typer.Option(
        "--reward-pooling",
        metavar="NAME=RULE",
        help="Where this reward's score is read: last_token, or last_not_pad (before a last token that is the padding "
        "token, as transformers' classifiers do). Without it: what its onebase.json says, or else last_token. May be "
        "repeated.",
        rich_help_panel=_ADAPTERS,
    ),
]
Policies = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        metavar="NAME[=PATH]",
        help="A policy to train: fresh, or from a PEFT directory; has a value head either way. May be repeated.",
        rich_help_panel=_ADAPTERS,
    ),
]
References = Annotated[
    list[str] | None,
    typer.Option(
        "--reference",
        metavar="NAME=PATH",
        help="A frozen reference other than the bare base. May be repeated.",
        rich_help_panel=_ADAPTERS,
    ),
]
Critics = Annotated[
    list[str] | None,
    typer.Option(
        "--critic",
        metavar="NAME[=PATH]",
        help="An adapter that gives values, trained beside a policy: fresh, or from the PEFT directory of a critic or "
        "a reward. May be repeated.",
        rich_help_panel=_ADAPTERS,
    ),
]
PolicyRank = Annotated[int, typer.Option(help="LoRA rank of fresh policies and critics.", rich_help_panel=_ADAPTERS)]
PolicyAlpha = Annotated[float, typer.Option(help="LoRA alpha of fresh policies.", rich_help_panel=_ADAPTERS)]
Roots = Annotated[
    list[Path] | None,
    typer.Option(
        "--root",
        metavar="DIR",
        help="Clients may load and save adapters under this directory; with --tokens each tenant under DIR/TENANT, and "
        "the operator under all of it. May be repeated; without it they may not.",
        rich_help_panel=_NETWORK,
    ),
]
SharedRoots = Annotated[
    list[Path] | None,
    typer.Option(
        "--shared-root",
        metavar="DIR",
        help="Every tenant may load adapters from under this directory, and none may save there. May be repeated.",
        rich_help_panel=_NETWORK,
    ),
]
Host = Annotated[
    str,
    typer.Option(
        help="Address to listen on. One that other machines reach needs TLS, or --insecure.", rich_help_panel=_NETWORK
    ),
]
Port = Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", rich_help_panel=_NETWORK)]
PortFile = Annotated[
    Path | None, typer.Option(help="Write the port here when calls are served.", rich_help_panel=_NETWORK)
]
DrainSeconds = Annotated[
    float, typer.Option(help="How long work in flight may go on after SIGTERM.", rich_help_panel=_NETWORK)
]
State = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Keep adapters, sessions and answers here, and go on from them after a restart, also after kill -9. "
        "Without it nothing outlives the process.",
        rich_help_panel=_STATE,
    ),
]
Checkpoints = Annotated[
    str,
    typer.Option(
        metavar="URL",
        help="Keep the adapters' checkpoints there instead of in --state DIR: any URL that fsspec knows, as "
        "s3://bucket/prefix, gs://bucket/prefix or file:///directory; pip install its driver (s3fs, gcsfs), which "
        "takes its credentials from the environment. It belongs to one state.",
        rich_help_panel=_STATE,
    ),
]
Adopt = Annotated[
    bool,
    typer.Option(
        "--adopt",
        help="Take over the adapters at --checkpoints URL whose --state DIR is lost, with a new and empty DIR. "
        "Sessions and answers are not among them.",
        rich_help_panel=_STATE,
    ),
]
Durability = Annotated[
    str,
    typer.Option(
        help="checkpoint or step. checkpoint: an adapter is saved as the options below say, when its lease ends and "
        "when the server stops. step: each OptimStep is on the disk before it is answered, which took 30 ms more for "
        "a checkpoint of 2 MiB (docs/durability.md).",
        rich_help_panel=_STATE,
    ),
]
CheckpointSteps = Annotated[
    int, typer.Option(help="Save an adapter after so many steps; 0: not for that reason.", rich_help_panel=_STATE)
]
CheckpointSeconds = Annotated[
    float,
    typer.Option(
        help="Save an adapter so many seconds after a step that was not saved; 0: not for that reason.",
        rich_help_panel=_STATE,
    ),
]
KeepCheckpoints = Annotated[int, typer.Option(help="Checkpoints kept of each adapter.", rich_help_panel=_STATE)]
EvictIdleSeconds = Annotated[
    float,
    typer.Option(
        help="With --state: an adapter that nobody used for so long leaves device memory, and comes back when it is "
        "used; 0: none does for that reason.",
        rich_help_panel=_STATE,
    ),
]
AdapterMemory = Annotated[
    int,
    typer.Option(
        metavar="BYTES",
        help="With --state: while all adapters take more device memory, with gradients and moments, the least recently "
        "used idle ones leave it; 0: no limit.",
        rich_help_panel=_STATE,
    ),
]
Restore = Annotated[
    list[str] | None,
    typer.Option(
        "--restore",
        metavar="NAME=VERSION",
        help="Go back to an older checkpoint of an adapter. May be repeated.",
        rich_help_panel=_STATE,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=_ENGINE)]
DType = Annotated[
    str,
    typer.Option(
        "--dtype", help="auto (as the model was saved), float32, bfloat16 or float16.", rich_help_panel=_ENGINE
    ),
]
Quantization = Annotated[
    str,
    typer.Option(
        help="none, int8 or nf4: keep the weights of the linear layers in 8 or 4 bits. Saves memory, not time: on a "
        "CPU prompts, scores and training take up to a tenth longer, decoding up to two fifths. Adapters and heads "
        "stay float32, embeddings as they are, and a row's numbers depend on its batch no more than without it. An "
        "adapter trained on another precision is loaded with a warning.",
        rich_help_panel=_ENGINE,
    ),
]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 is half the cores.", rich_help_panel=_ENGINE)]
MaxContext = Annotated[
    int, typer.Option(help="Longest sequence in tokens; 0 is the model's own.", rich_help_panel=_ENGINE)
]
KvSlots = Annotated[int, typer.Option(help="Most completions that run at once.", rich_help_panel=_ENGINE)]
KvBytes = Annotated[
    int,
    typer.Option(
        help="Most bytes of the key-value cache; completions that find no room wait, or go on later. 0: what "
        "--kv-slots completions of full length need.",
        rich_help_panel=_ENGINE,
    ),
]
StepTokens = Annotated[
    int,
    typer.Option(
        help="Most tokens of prompts and scored rows in one engine step, for which others wait. 0: 1024 on a CPU, 4096 "
        "on a GPU.",
        rich_help_panel=_ENGINE,
    ),
]
TrainTokens = Annotated[
    int,
    typer.Option(
        help="Most tokens of training rows in one engine step, of one or several policies: what their activations "
        "take, and how long others wait. 0: 256 on a CPU, 4096 on a GPU.",
        rich_help_panel=_ENGINE,
    ),
]
Exact = Annotated[
    str,
    typer.Option(
        help="on, off or auto. Exact: a completion's logprobs and values are, bit for bit, those that Logprob and "
        "training give its tokens, whoever else is in the batch; so PPO takes them from the rollout and skips a pass. "
        "Costs 3 to 4 % of decoding on a CPU, 1 % elsewhere. auto: on a CPU, if it is seen to hold when the base is "
        "loaded. on: serve only if it holds. off: fused attention kernels.",
        rich_help_panel=_ENGINE,
    ),
]
Kernels = Annotated[
    str,
    typer.Option(
        help="on, off or auto: the adapters' products by Triton kernels, in prompts, decoding and scoring. auto: on "
        "CUDA, if they are seen to work when the base is loaded. on: serve only with them. Training, and an exact "
        "server, use torch's products.",
        rich_help_panel=_ENGINE,
    ),
]
GradientCheckpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing",
        help="Recompute layers in the backward pass: a third more time in training, far less memory.",
        rich_help_panel=_ENGINE,
    ),
]
VersionWindow = Annotated[
    int,
    typer.Option(
        help="How many old versions of each policy a request may still name; each costs its weights. A version that "
        "is being read is always kept.",
        rich_help_panel=_ENGINE,
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python that comes with the model.", rich_help_panel=_ENGINE)
]
Tokenizer = Annotated[
    str,
    typer.Option(
        help="A hub id or a directory with another tokenizer than the model's own, such as an adapter that was trained "
        "with one.",
        rich_help_panel=_ENGINE,
    ),
]
ChatTemplate = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A Jinja file that renders conversations, in place of the tokenizer's own.",
        rich_help_panel=_ENGINE,
    ),
]
MaxUploadBytes = Annotated[
    int,
    typer.Option(
        help="Most bytes of one upload; it lies in the state directory, or else the temporary one (TMPDIR), until it "
        "is loaded. Also of what a tenant loads from under a root.",
        rich_help_panel=_NETWORK,
    ),
]
StallSeconds = Annotated[
    float,
    typer.Option(
        help="Health turns NOT_SERVING while one step of the engine goes on for longer.", rich_help_panel=_NETWORK
    ),
]
StallRestartSeconds = Annotated[
    float,
    typer.Option(
        help="Take a step of the engine that goes on for longer for a crash: with --state the server starts again by "
        "itself and goes on from what is durable, without it ends with code 70. 0: never.",
        rich_help_panel=_NETWORK,
    ),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The server's certificates (PEM); needs --tls-key.", rich_help_panel=_SECURITY),
]
TlsKey = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Their private key (PEM).", rich_help_panel=_SECURITY)
]
TlsClientCa = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Let in only clients with a certificate that one of these signed (PEM).",
        rich_help_panel=_SECURITY,
    ),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure",
        help="Listen on an address that other machines reach without TLS: what goes over it can be read and changed.",
        rich_help_panel=_SECURITY,
    ),
]
TokensFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Let in only calls with one of these tokens (`onebase token create`); the file is read again when it "
        "changes. Without it everybody who reaches the server may do everything.",
        rich_help_panel=_SECURITY,
    ),
]
Audit = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write a line of JSON for each call that changes something or is refused.",
        rich_help_panel=_SECURITY,
    ),
]
StreamIdle = Annotated[
    float,
    typer.Option(
        help="End a stream whose client neither reads nor sends for so many seconds.", rich_help_panel=_SECURITY
    ),
]
_QUOTA = "requests, completions (at once), tokens_per_second, adapters, adapter_bytes, sessions; 8G is 8 GiB"
TenantQuota = Annotated[
    str,
    typer.Option(
        metavar="NAME=N,…",
        help=f"Most that one tenant may have of {_QUOTA}. With --tokens, requests and sessions are a quarter of what "
        "the server takes if not said otherwise.",
        rich_help_panel=_SECURITY,
    ),
]
WholeQuota = Annotated[
    str,
    typer.Option("--quota", metavar="NAME=N,…", help="The same for all tenants together.", rich_help_panel=_SECURITY),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log every finished call.")]


def serve(
    model: Model,
    rewards: Rewards = None,
    policies: Policies = None,
    references: References = None,
    critics: Critics = None,
    reward_append_eos: RewardAppendEos = None,
    reward_pooling: RewardPooling = None,
    policy_rank: PolicyRank = 16,
    policy_alpha: PolicyAlpha = 32.0,
    roots: Roots = None,
    shared_roots: SharedRoots = None,
    host: Host = "127.0.0.1",
    port: Port = 7070,
    port_file: PortFile = None,
    drain_seconds: DrainSeconds = 30.0,
    stall_seconds: StallSeconds = 300.0,
    stall_restart_seconds: StallRestartSeconds = 0.0,
    max_upload_bytes: MaxUploadBytes = 4 * 2**30,
    state: State = None,
    checkpoints: Checkpoints = "",
    adopt: Adopt = False,
    durability: Durability = "checkpoint",
    checkpoint_steps: CheckpointSteps = 0,
    checkpoint_seconds: CheckpointSeconds = 60.0,
    keep_checkpoints: KeepCheckpoints = 2,
    restore: Restore = None,
    evict_idle_seconds: EvictIdleSeconds = 600.0,
    adapter_memory: AdapterMemory = 0,
    device: Device = "auto",
    dtype: DType = "auto",
    quantization: Quantization = "none",
    threads: Threads = 0,
    max_context: MaxContext = 0,
    kv_slots: KvSlots = 32,
    kv_bytes: KvBytes = 0,
    step_tokens: StepTokens = 0,
    train_tokens: TrainTokens = 0,
    exact: Exact = "auto",
    kernels: Kernels = "auto",
    gradient_checkpointing: GradientCheckpointing = False,
    version_window: VersionWindow = 0,
    trust_remote_code: TrustRemoteCode = False,
    tokenizer: Tokenizer = "",
    chat_template: ChatTemplate = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_client_ca: TlsClientCa = None,
    insecure: Insecure = False,
    tokens: TokensFile = None,
    audit_log: Audit = None,
    stream_idle_seconds: StreamIdle = 60.0,
    tenant_quota: TenantQuota = "",
    whole_quota: WholeQuota = "",
    verbose: Verbose = False,
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
    from onebase.server.flags import quota, reward_sources, sources, state_config

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
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
        Console(stderr=True, highlight=False).print(f"[bold red]error[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None


def _run(config: ServerConfig, console: Console) -> None:
    from onebase.server.app import check_address, open_parts
    from onebase.server.app import serve as serve_parts
    from onebase.server.process import spare_what_stays
    from onebase.server.successor import Restarts

    restarts = Restarts.inherited()
    config = restarts.keep_port(config)
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
