"""The options of `onebase serve`: what each is called, and what its help says.

What they mean together is `flags`' and `config`'s to know.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onebase.server.sizes import size

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
        parser=size,
        help="With --state: while all adapters take more device memory, with gradients and moments, the least recently "
        "used idle ones leave it; may end in K, M or G; 0: no limit.",
        rich_help_panel=_STATE,
    ),
]
Restore = Annotated[
    list[str] | None,
    typer.Option(
        "--restore",
        metavar="NAME=VERSION",
        help="Go back to an older checkpoint of an adapter; done once, also where the server starts again with this. "
        "May be repeated.",
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
        metavar="BYTES",
        parser=size,
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
        "Costs 3 to 4 % of decoding on a CPU, 1 % elsewhere; on a CPU half-precision bases multiply in float32 then. "
        "auto: on a CPU, if it is seen to hold when the base is loaded. on: serve only if it holds. off: fused "
        "attention kernels.",
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
        metavar="BYTES",
        parser=size,
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
_QUOTA = (
    "requests, completions (at once), tokens_per_second, adapters, adapter_bytes, sessions, saved_bytes; 8G is 8 GiB"
)
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
