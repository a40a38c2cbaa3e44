"""The server's settings: frozen, checked once, each problem named by its key."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, replace
from pathlib import Path

from onebase.server.jobs import Pooling
from onebase.server.names import BASE_NAME, problem


class ConfigError(ValueError):
    """A setting that cannot work; the message names it, its value and the way out."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _require(fine: bool, key: str, value: object, way_out: str) -> None:
    if not fine:
        raise ConfigError(f"{key} is {value!r}: {way_out}")


@dataclass(frozen=True)
class Budget:
    """Most tokens of one engine step.

    Whoever comes waits for the step under way, and its activations are held; so a step is as small as the device can
    be without losing speed: matrix products of a few hundred rows on a CPU, of a few thousand on a GPU.
    """

    step_tokens: int
    train_tokens: int


CPU_BUDGET, CUDA_BUDGET = Budget(1024, 256), Budget(4096, 4096)


@dataclass(frozen=True)
class EngineConfig:
    """The base model and the device."""

    model: str
    """A hub id or a directory."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N; auto takes CUDA where there is one."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16; auto is what the model was saved in."""
    quantization: str = "none"
    """none, int8 or nf4: how the weights of the linear layers are kept; products are made in the dtype all the same."""
    threads: int = 0
    """CPU threads of the engine; 0 is half the cores: other programs share them, and small matrices gain nothing."""
    max_context: int = 0
    """Longest sequence in tokens; 0 is the model's own."""
    kv_slots: int = 32
    """Most completions that run at once."""
    kv_bytes: int = 0
    """Most bytes of the key-value cache; 0 is what kv_slots completions of full length need."""
    step_tokens: int = 0
    """Most tokens of prompts and scored rows in one engine step; a longer row makes a step of its own. 0: `Budget`."""
    train_tokens: int = 0
    """Most tokens of the micro-batches in one training step; their activations are held until the backward pass."""
    exact: str = "auto"
    """on, off or auto: whether Generate's numbers are Logprob's bit for bit; auto is on a CPU where it can be shown."""
    kernels: str = "auto"
    """on, off or auto: Triton kernels make the adapters' products except in training; auto: on CUDA, if they can."""
    gradient_checkpointing: bool = False
    """Keep no activations inside layers while training: a third more time, far less memory."""
    version_window: int = 0
    """How many old versions of each policy can still be asked for by number; each costs its weights."""
    trust_remote_code: bool = False
    """Run Python that comes with the model."""
    tokenizer: str = ""
    """A hub id or a directory with another tokenizer than the model's own; empty is the model's."""
    chat_template: Path | None = None
    """A file with the Jinja template of conversations; None is the tokenizer's own, if it has one."""

    def __post_init__(self) -> None:
        _require(bool(self.model), "model", self.model, "give a hub id or a directory")
        _require(
            self.device in ("auto", "cpu", "cuda") or self.device.removeprefix("cuda:").isdigit(),
            "device",
            self.device,
            "use auto, cpu, cuda or cuda:N",
        )
        dtypes = ("auto", "float32", "bfloat16", "float16")
        _require(self.dtype in dtypes, "dtype", self.dtype, f"use one of {', '.join(dtypes)}")
        kinds = ("none", "int8", "nf4")
        _require(self.quantization in kinds, "quantization", self.quantization, f"use one of {', '.join(kinds)}")
        _require(self.threads >= 0, "threads", self.threads, "use 0 or more")
        _require(self.max_context >= 0, "max_context", self.max_context, "use 0 or more")
        _require(self.kv_slots >= 1, "kv_slots", self.kv_slots, "use 1 or more")
        _require(self.kv_bytes >= 0, "kv_bytes", self.kv_bytes, "use 0 or more")
        _require(self.version_window >= 0, "version_window", self.version_window, "use 0 or more")
        for key, value in (("step_tokens", self.step_tokens), ("train_tokens", self.train_tokens)):
            _require(value == 0 or value >= 16, key, value, "use 16 or more, or 0 for what suits the device")
        for key, choice in (("exact", self.exact), ("kernels", self.kernels)):
            _require(choice in ("auto", "on", "off"), key, choice, "use auto, on or off")
        both = self.exact == "on" and self.kernels == "on"
        _require(not both, "kernels", self.kernels, "an exact engine's products are torch's: use auto or off")
        template = self.chat_template
        _require(template is None or template.is_file(), "chat_template", str(template), "there is no such file")

    def budget(self, device: str) -> Budget:
        """The budget on a device, such as cpu or cuda:0."""
        suits = CUDA_BUDGET if device.startswith("cuda") else CPU_BUDGET
        return Budget(self.step_tokens or suits.step_tokens, self.train_tokens or suits.train_tokens)


@dataclass(frozen=True)
class Limits:
    """What a request, a session and the whole queue may ask for."""

    max_sequences_per_request: int = 1024
    max_tokens_per_request: int = 1_048_576
    max_queued_requests: int = 1024
    max_queued_requests_per_session: int = 64
    max_rank: int = 512
    max_message_bytes: int = 64 * 2**20
    max_upload_bytes: int = 4 * 2**30
    max_sessions: int = 4096
    scratch_uploads: int = 4
    """Room for adapters' files on their way, in uploads of the largest size; a tenant's share is a quarter of it."""
    max_transfers_per_tenant: int = 8
    """Uploads, downloads and loads of one tenant that are under way at once."""

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            _require(value >= 1, key, value, "use 1 or more")


@dataclass(frozen=True)
class Quota:
    """What somebody may have at once; 0 is no limit."""

    requests: int = 0
    """Requests that wait or run."""
    completions: int = 0
    """Completions of requests that wait or run."""
    tokens_per_second: float = 0.0
    """Tokens of prompts, completions (as many as were asked for), scored and trained rows."""
    adapters: int = 0
    adapter_bytes: int = 0
    """Float32 parameters of adapters; of those that are trained also gradients and moments."""
    sessions: int = 0
    """Open sessions."""
    saved_bytes: int = 0
    """Files in tenants' own directories under the roots. The operator saves without a limit."""

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            _require(math.isfinite(value) and value >= 0, key, value, "use 0 or more")

    @property
    def limits_adapters(self) -> bool:
        """Whether there is a limit to adapters."""
        return bool(self.adapters or self.adapter_bytes)


@dataclass(frozen=True)
class AdapterSource:
    """An adapter to have from the start: NAME, or NAME=PATH."""

    name: str
    path: Path | None
    append_eos: bool | None = None
    """Whether an end-of-sequence token belongs behind what this reward reads; None is what its manifest says."""
    pooling: Pooling | None = None
    """Where this reward's score is read; None is what its manifest says."""


@dataclass(frozen=True)
class StateConfig:
    """Where and when adapters, sessions and answers are made durable."""

    path: Path
    """A directory of this server's own."""
    durability: str = "checkpoint"
    """checkpoint or step: whether each OptimStep is durable before it is answered."""
    steps: int = 0
    """A checkpoint after so many steps of an adapter; 0 is never for that reason."""
    seconds: float = 60.0
    """A checkpoint so many seconds after a step that is in none; 0 is never for that reason."""
    keep: int = 2
    """How many checkpoints of an adapter stay."""
    restore: tuple[tuple[str, int], ...] = ()
    """Adapters that go back to an older version, by name."""
    checkpoints: str = ""
    """The URL where checkpoints lie; "" is in the directory."""
    adopt: bool = False
    """Take over what lies there, where the directory that it belonged to is lost."""
    evict_idle_seconds: float = 600.0
    """An adapter that nobody used for so long leaves device memory until it is used; 0 is never."""
    adapter_memory: int = 0
    """Bytes of device memory for all adapters, over which the least recently used leave it; 0 is no limit."""

    def __post_init__(self) -> None:
        fine = self.durability in ("checkpoint", "step")
        _require(fine, "durability", self.durability, "use checkpoint or step")
        _require(self.steps >= 0, "checkpoint_steps", self.steps, "use 0 or more")
        seconds_fine = math.isfinite(self.seconds) and self.seconds >= 0
        _require(seconds_fine, "checkpoint_seconds", self.seconds, "use 0 or more")
        _require(self.keep >= 1, "keep_checkpoints", self.keep, "use 1 or more")
        idle_fine = math.isfinite(self.evict_idle_seconds) and self.evict_idle_seconds >= 0
        _require(idle_fine, "evict_idle_seconds", self.evict_idle_seconds, "use 0 or more")
        _require(self.adapter_memory >= 0, "adapter_memory", self.adapter_memory, "use 0 or more bytes")
        _require(self.path.is_dir() or not self.path.exists(), "state", str(self.path), "it is a file")
        _require(bool(self.checkpoints) or not self.adopt, "adopt", True, "give the URL of --checkpoints too")


@dataclass(frozen=True)
class Security:
    """Who is let in, and how the way to the server is kept private."""

    tls_cert: Path | None = None
    """The server's certificates, PEM; with `tls_key` the server speaks TLS only."""
    tls_key: Path | None = None
    """Their private key, PEM."""
    tls_client_ca: Path | None = None
    """Certificates, PEM; only clients with a certificate that one of them signed are let in."""
    insecure: bool = False
    """Listen on an address that other machines reach although there is no TLS."""
    tokens: Path | None = None
    """The file of bearer tokens; None lets everybody in as the operator."""
    audit_log: Path | None = None
    """Gets a line of JSON for each call that changes something or is refused."""
    stream_idle_seconds: float = 60.0
    """How long a stream waits for its client to read, or to send."""

    def __post_init__(self) -> None:
        for key, path in (
            ("tls_cert", self.tls_cert),
            ("tls_key", self.tls_key),
            ("tls_client_ca", self.tls_client_ca),
        ):
            _require(path is None or path.is_file(), key, str(path), "there is no such file")
        both = (self.tls_cert is None) == (self.tls_key is None)
        _require(both, "tls_cert", str(self.tls_cert), "give --tls-cert and --tls-key, or neither")
        alone = self.tls_client_ca is None or self.tls_cert is not None
        _require(alone, "tls_client_ca", str(self.tls_client_ca), "it needs --tls-cert and --tls-key too")
        fine = math.isfinite(self.stream_idle_seconds) and self.stream_idle_seconds > 0
        _require(fine, "stream_idle_seconds", self.stream_idle_seconds, "use a number above 0")
        no_directory = self.tokens is None or not self.tokens.is_dir()
        _require(no_directory, "tokens", str(self.tokens), "it is a directory: give a file in it")
        _require(
            self.tokens is None or self.tokens.is_file(),
            "tokens",
            str(self.tokens),
            "there is no such file: `onebase token create --tokens FILE --scope all` makes it, with a first token",
        )

    @property
    def tls(self) -> bool:
        """Whether the server speaks TLS."""
        return self.tls_cert is not None


@dataclass(frozen=True)
class ServerConfig:
    """Everything `onebase serve` needs."""

    engine: EngineConfig
    host: str = "127.0.0.1"
    port: int = 7070
    """0 takes a free port, which is printed and written to `port_file`."""
    port_file: Path | None = None
    rewards: tuple[AdapterSource, ...] = ()
    policies: tuple[AdapterSource, ...] = ()
    references: tuple[AdapterSource, ...] = ()
    critics: tuple[AdapterSource, ...] = ()
    roots: tuple[Path, ...] = ()
    """Directories under which adapters may be loaded and saved; relative paths mean the first."""
    shared_roots: tuple[Path, ...] = ()
    """Directories from which every tenant may load adapters, and none may save."""
    state: StateConfig | None = None
    """What outlives the process; None: nothing does."""
    limits: Limits = Limits()
    security: Security = Security()
    tenant_quota: Quota = Quota()
    """What each tenant may have."""
    quota: Quota = Quota()
    """What all of them may have together."""
    drain_seconds: float = 30.0
    """How long work in flight may go on after SIGTERM."""
    stall_seconds: float = 300.0
    """A step of the engine that goes on for so long turns health NOT_SERVING until it ends."""
    stall_restart_seconds: float = 0.0
    """One that goes on for so long is taken for a crash; 0 is never."""
    policy_rank: int = 16
    """LoRA rank of the policies and critics made here from the start."""
    policy_alpha: float = 32.0
    """LoRA alpha of the same."""

    def __post_init__(self) -> None:
        _require(0 <= self.port < 65536, "port", self.port, "use 0 to 65535")
        _require(
            is_loopback(self.host) or self.security.tls or self.security.insecure,
            "host",
            self.host,
            "other machines reach it, and there is no TLS: give --tls-cert and --tls-key, or say --insecure if the "
            "network is private",
        )
        drain_fine = math.isfinite(self.drain_seconds) and self.drain_seconds >= 0
        _require(drain_fine, "drain_seconds", self.drain_seconds, "use 0 or more")
        stall_fine = math.isfinite(self.stall_seconds) and self.stall_seconds > 0
        _require(stall_fine, "stall_seconds", self.stall_seconds, "use a number above 0")
        restart = self.stall_restart_seconds
        restart_fine = math.isfinite(restart) and restart >= 0
        _require(restart_fine, "stall_restart_seconds", restart, "use 0 or more")
        rank_way_out = f"use 1 to {self.limits.max_rank}"
        _require(1 <= self.policy_rank <= self.limits.max_rank, "policy_rank", self.policy_rank, rank_way_out)
        alpha_fine = math.isfinite(self.policy_alpha) and self.policy_alpha > 0
        _require(alpha_fine, "policy_alpha", self.policy_alpha, "use a number above 0")
        for root in self.roots:
            _require(root.is_dir() or not root.exists(), "root", str(root), "it is a file: give a directory")
        for root in self.shared_roots:
            _require(root.is_dir(), "shared_root", str(root), "there is no such directory")
        if self.security.tokens is not None:
            self._check_walls()
        self._check_adapters()
        self._check_quotas()

    def quota_of_tenants(self) -> Quota:
        """What each tenant may have; one of several never has more than a quarter of the queue, or of the sessions."""
        mine = self.tenant_quota
        if self.security.tokens is None:
            return mine
        return replace(
            mine,
            requests=mine.requests or max(1, self.limits.max_queued_requests // 4),
            sessions=mine.sessions or max(1, self.limits.max_sessions // 4),
        )

    def _check_walls(self) -> None:
        """No root may hold another: the directory of a tenant would be in that of another, or everybody's."""
        roots = [*self.roots, *self.shared_roots]
        for index, root in enumerate(roots):
            for other in (*roots[:index], *roots[index + 1 :]):
                apart = not root.resolve().is_relative_to(other.resolve())
                _require(apart, "root", str(root), f"it is in {str(other)!r}, and with tokens no root may hold another")

    def _check_quotas(self) -> None:
        """The adapters that are named here are the operator's, and count as a tenant's do."""
        there = len(self.rewards) + len(self.policies) + len(self.references) + len(self.critics)
        for key, most in (("tenant_quota", self.tenant_quota.adapters), ("quota", self.quota.adapters)):
            way_out = f"{there} adapters are to be there from the start, which count too: allow as many, or name fewer"
            _require(not most or there <= most, key, f"adapters={most}", way_out)

    def _check_adapters(self) -> None:
        names = [source.name for source in (*self.rewards, *self.policies, *self.references, *self.critics)]
        for name in names:
            wrong = problem(name)
            _require(wrong is None, "adapter", name, f"this name {wrong}")
            _require(
                name != BASE_NAME, "adapter", name, "it is reserved for the base with no adapter: use another name"
            )
            _require(names.count(name) == 1, "adapter", name, "give each adapter a name of its own")
        for source in (*self.rewards, *self.references):
            _require(source.path is not None, "adapter", source.name, "give its directory too, as NAME=PATH")
