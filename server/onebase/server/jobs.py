"""What travels inside the server, between the RPC edge and the worker: plain data, no protobuf and no tensor.

An adapter is meant by its `uid`, which is never used twice, so a job keeps meaning the adapter that it was
admitted with even if the name is deleted and given away again while the job waits. `BASE` means no adapter.

Arrays are numpy: token ids int64 of shape [T], numbers float32. In a row of T tokens whose first `start` are the
prompt, the completion has t = T - start tokens, and every per-token array has t entries: the number that belongs
to each completion token, computed at the position before it.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from onebase.server.identity import OPERATOR

BASE = 0
"""The uid of the base with no adapter."""

PEFT_DEFAULT = "peft-default"
"""As the only target module: the layers that PEFT adapts of this architecture where nobody names any."""

MAX_CLIENT_STATE = 2**20
"""Most bytes that a trainer keeps with its adapter."""

Tokens = NDArray[np.int64]
Floats = NDArray[np.float32]

Message = Mapping[str, str]
"""One message of a conversation, in transformers' words: its "role" and its "content"."""


class AdapterKind(enum.Enum):
    """What an adapter is for."""

    POLICY = "policy"
    REWARD = "reward"
    REFERENCE = "reference"
    CRITIC = "critic"

    @property
    def trained(self) -> bool:
        """Whether its adapters are trained, and so leased; the others are frozen and shared by everybody."""
        return self in (AdapterKind.POLICY, AdapterKind.CRITIC)


class Pooling(enum.Enum):
    """Where a reward adapter's score is read."""

    LAST_TOKEN = "last_token"
    """The last token, whatever it is."""
    LAST_NOT_PAD = "last_not_pad"
    """The last token that is not the padding token, as transformers' sequence classifiers do."""


class Work(enum.Enum):
    """Kinds of work, in the order of their priority."""

    ADMIN = "admin"
    INTERACTIVE = "interactive"
    GENERATE = "generate"
    SCORE = "score"
    TRAIN = "train"


class FinishReason(enum.Enum):
    """Why a completion ended."""

    EOS = "eos"
    STOP_STRING = "stop_string"
    STOP_TOKEN = "stop_token"
    LENGTH = "length"


@dataclass(frozen=True)
class LoraSpec:
    """The shape of a LoRA adapter, in PEFT's words."""

    rank: int = 16
    alpha: float = 32.0
    target_modules: tuple[str, ...] = ("all-linear",)
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterMemory:
    """Device memory that an adapter holds, in bytes."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    old_versions: int = 0


@dataclass(frozen=True)
class AdapterFacts:
    """What the engine knows of an adapter, at one moment."""

    uid: int
    kind: AdapterKind
    version: int
    lora: LoraSpec
    value_head: bool
    num_labels: int
    parameter_count: int
    memory: AdapterMemory
    pending_gradients: int
    append_eos: bool | None = (
        None  # whether a reward declares that it reads an end-of-sequence token; None says nothing
    )
    pooling: Pooling = Pooling.LAST_TOKEN  # of a reward
    resident: bool = True  # whether its numbers are in device memory
    idle_seconds: float = 0.0  # since a job last needed its numbers; 0 while they are read


# ---------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class RowResult:
    """Numbers of one scored row; what was not asked for is None. t completion tokens, T tokens in all, L labels."""

    logprobs: Floats | None = None  # [t]
    entropy: Floats | None = None  # [t], nats
    values: Floats | None = None  # [t]
    scores: Floats | None = None  # [L], at the token `score_at`
    token_scores: Floats | None = None  # [T, L]
    logits: Floats | None = None  # [t, vocabulary]


@dataclass(frozen=True)
class ScoreResult:
    """One result per row, and the version of every adapter that was read."""

    rows: tuple[RowResult, ...]
    versions: Mapping[int, int]


@dataclass(frozen=True)
class CompletionChunk:
    """The next tokens of one completion."""

    prompt_index: int
    completion_index: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    values: tuple[float, ...]
    text: str
    version: int
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class ForwardBackwardResult:
    """Metrics of the pass, and the numbers under the current weights, one array per row, or none."""

    version: int
    metrics: Mapping[str, float]
    logprobs: tuple[Floats, ...]  # [t]; none where the loss needs no logits
    entropy: tuple[Floats, ...]  # [t], nats; none where the loss needs no logits
    values: tuple[Floats, ...]  # [t]; none without a value head
    ratio_threshold_exceeded: bool
    facts: AdapterFacts


@dataclass(frozen=True)
class OptimStepResult:
    """The new version, and the gradients' global norm before clipping."""

    version: int
    grad_norm: float
    gradients_applied: int
    facts: AdapterFacts
    saved: Future[SaveResult] | None = None  # of the new version, where `save_to` asked for it


@dataclass(frozen=True)
class ClientState:
    """What a trainer keeps with its adapter: opaque to the server."""

    data: bytes = b""
    version: int = 0
    """The adapter's version that it was left with."""


@dataclass(frozen=True)
class SaveResult:
    """Where an adapter was written."""

    path: Path
    version: int
    bytes: int
    snapshot: int = 0  # counts what the engine was asked to write: of two of a version the higher is the later one


# ------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class ScoreRow:
    """A sequence to score under one adapter; set what to compute. `start` is the number of prompt tokens."""

    adapter: int
    tokens: Tokens
    start: int = 0
    logprobs: bool = False
    entropy: bool = False
    values: bool = False
    score: bool = False
    token_scores: bool = False
    logits: bool = False
    score_at: int = -1  # index of the token at which the score is read; it depends on none behind that


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Filters apply in the order temperature, top_k, top_p, min_p."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    ignore_eos: bool = False
    min_new_tokens: int = 0


@dataclass(frozen=True)
class TrainRow:
    """A sequence to train on. All arrays have t entries; what its loss does not use is None.

    `mask` is True where a token counts; `weights` is what its term weighs in the loss's sum, None is 1.
    """

    tokens: Tokens
    start: int
    old_logprobs: Floats | None
    old_values: Floats | None
    advantages: Floats | None
    returns: Floats | None
    mask: NDArray[np.bool_]
    reference_logprobs: Floats | None = None
    weights: Floats | None = None
    logprob_gradients: Floats | None = None
    value_gradients: Floats | None = None
    entropy_gradients: Floats | None = None


@dataclass(frozen=True)
class PpoLoss:
    """Settings of the clipped PPO loss, with TRL's defaults."""

    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    ratio_threshold: float = 10.0
    cliprange_high: float | None = None  # None is cliprange
    kl_coef: float = 0.0
    entropy_coef: float = 0.0


@dataclass(frozen=True)
class ImportanceSamplingLoss:
    """The policy gradient with importance sampling."""


@dataclass(frozen=True)
class CrossEntropyLoss:
    """Supervised fine-tuning."""


@dataclass(frozen=True)
class DpoLoss:
    """Settings of direct preference optimization; rows come in pairs, chosen then rejected."""

    beta: float = 0.1
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class CustomLoss:
    """A loss that the client gives by its derivatives."""


@dataclass(frozen=True)
class ValueLoss:
    """Settings of the clipped value loss alone."""

    cliprange_value: float = 0.2


Loss = PpoLoss | ImportanceSamplingLoss | CrossEntropyLoss | DpoLoss | CustomLoss | ValueLoss


@dataclass(frozen=True)
class AdamW:
    """Settings of one AdamW step."""

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0


# ------------------------------------------------------------------------------------------------------- jobs

R = TypeVar("R")


@dataclass(eq=False, kw_only=True)
class Job(Generic[R]):
    """A request on its way through the worker. `done` gets the result or an OnebaseError, exactly once."""

    tenant: str = OPERATOR  # whose turns it takes
    session: str = ""  # in which of that tenant's queues; "" is all calls without a session
    deadline: float | None = None  # on time.monotonic's clock
    done: Future[R] = field(default_factory=Future, repr=False)
    _cancelled: threading.Event = field(default_factory=threading.Event, repr=False)

    work = Work.ADMIN

    def cancel(self) -> None:
        """Asks the worker to drop the job at its next engine step. Any thread may call this."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether cancel() was called."""
        return self._cancelled.is_set()


@dataclass(eq=False, kw_only=True)
class ScoreJob(Job[ScoreResult]):
    """Rows to score, of any adapters. Interactive ones go first."""

    rows: Sequence[ScoreRow]
    versions: Mapping[int, int] = field(default_factory=dict)  # uid -> the version that must answer
    interactive: bool = False

    @property
    def work(self) -> Work:  # type: ignore[override]
        """Interactive or bulk."""
        return Work.INTERACTIVE if self.interactive else Work.SCORE


@dataclass(eq=False, kw_only=True)
class GenerateJob(Job[None]):
    """Prompts to complete, n times each. `emit` is called on the worker's thread; `done` resolves after the last."""

    adapter: int
    prompts: Sequence[Tokens]
    sampling: Sampling
    emit: Callable[[CompletionChunk], None]
    n: int = 1
    version: int | None = None
    return_logprobs: bool = False
    return_values: bool = False
    stream_tokens: bool = False

    work = Work.GENERATE


@dataclass(eq=False, kw_only=True)
class ForwardBackwardJob(Job[ForwardBackwardResult]):
    """Rows to train one adapter on. `denominator` None is `count`."""

    adapter: int
    rows: Sequence[TrainRow]
    loss: Loss
    denominator: float | None = None
    expected_version: int | None = None
    expected_pending: int | None = None  # passes whose gradients must not have been lost

    work = Work.TRAIN

    @property
    def rows_per_term(self) -> int:
        """How many rows, one after the other, one term of the loss needs: they must share a micro-batch."""
        return 2 if isinstance(self.loss, DpoLoss) else 1

    @property
    def count(self) -> float:
        """How many terms there are: tokens that count, or pairs. Of a custom loss, whose derivatives say all, 1."""
        match self.loss:
            case DpoLoss():
                return len(self.rows) / self.rows_per_term
            case CustomLoss():
                return 1.0
            case _:
                return float(sum(int(row.mask.sum()) for row in self.rows))

    @property
    def needs_logprobs(self) -> bool:
        """Whether logits are needed at all."""
        return not isinstance(self.loss, ValueLoss)

    @property
    def needs_values(self) -> bool:
        """Whether the loss depends on a value head."""
        match self.loss:
            case PpoLoss(vf_coef=vf_coef):
                return vf_coef > 0
            case CustomLoss():
                return any(row.value_gradients is not None for row in self.rows)
            case loss:
                return isinstance(loss, ValueLoss)

    @property
    def needs_entropy_gradient(self) -> bool:
        """Whether the loss depends on the entropy, whose derivative costs another product with the embedding."""
        match self.loss:
            case PpoLoss(entropy_coef=entropy_coef):
                return entropy_coef > 0
            case CustomLoss():
                return any(row.entropy_gradients is not None for row in self.rows)
            case _:
                return False


@dataclass(eq=False, kw_only=True)
class OptimStepJob(Job[OptimStepResult]):
    """One AdamW step of one adapter."""

    adapter: int
    adamw: AdamW
    max_grad_norm: float = 0.0  # 0 does not clip
    expected_version: int | None = None
    expected_pending: int | None = None  # passes whose gradients must not have been lost
    client_state: bytes | None = None  # kept with the new version; None keeps what is there
    save_to: Path | None = None  # also write exactly the new version there, with its optimizer

    work = Work.TRAIN


@dataclass(eq=False, kw_only=True)
class DropGradientsJob(Job[AdapterFacts]):
    """Drops an adapter's pending gradients: who made them has gone. Keeps its place among passes and steps."""

    adapter: int


@dataclass(eq=False, kw_only=True)
class CreateAdapterJob(Job[AdapterFacts]):
    """Makes a policy or critic under a new uid: fresh, or a copy of the adapter `init_from`, which ignores `lora`.

    It begins at `least_version`.
    """

    uid: int
    name: str  # for messages only
    lora: LoraSpec
    value_head: bool
    seed: int = 0
    kind: AdapterKind = AdapterKind.POLICY
    init_from: int | None = None
    least_version: int = 0
    max_bytes: int | None = None  # that it may take with gradients and moments; None is what the device has


@dataclass(eq=False, kw_only=True)
class LoadAdapterJob(Job[AdapterFacts]):
    """Reads an adapter from a directory under a new uid; it begins at its own version, or later at `least_version`."""

    uid: int
    name: str  # for messages only
    kind: AdapterKind
    path: Path
    value_head: bool = False
    with_optimizer: bool = False
    seed: int = 0
    least_version: int = 0
    append_eos: bool | None = None  # of a reward; None is what its manifest says
    pooling: Pooling | None = None  # of a reward; None is what its manifest says
    max_bytes: int | None = None  # that it may take, with gradients and moments if trained; None: what the device has


@dataclass(eq=False, kw_only=True)
class SaveAdapterJob(Job[SaveResult]):
    """Writes an adapter as a PEFT directory, or merged into the base as a transformers model."""

    adapter: int
    path: Path
    with_optimizer: bool = False
    with_client_state: bool = False
    overwrite: bool = False
    merged: bool = False
    stamp: str = ""  # of the call that asked for it, for the manifest; "" where nobody would ask for it again
    client_state: bytes | None = None  # replaces, before it is written, what is kept with the adapter


@dataclass(eq=False, kw_only=True)
class ClientStateJob(Job[ClientState]):
    """Reads what is kept with an adapter for its trainer."""

    adapter: int


@dataclass(eq=False, kw_only=True)
class DeleteAdapterJob(Job[None]):
    """Forgets an adapter. Completions under way keep the version they read."""

    adapter: int


@dataclass(eq=False, kw_only=True)
class EvictAdapterJob(Job[AdapterFacts]):
    """Frees an adapter's device memory, if it has that version and nothing needs it now; it comes back when used.

    The facts that it ends with say whether it is gone. `open` gives a directory with exactly those numbers, from now
    until the adapter is back, has a newer version or is deleted; it is called on a thread that may wait for it.
    """

    adapter: int
    version: int
    open: Callable[[], AbstractContextManager[Path]]


@dataclass(eq=False, kw_only=True)
class DescribeAdaptersJob(Job[Mapping[int, AdapterFacts]]):
    """Facts of all adapters."""


def adapters_of(job: Job[Any]) -> frozenset[int]:
    """The adapters that a job means, but for one that it makes or evicts; never BASE."""
    match job:
        case ScoreJob():
            named = frozenset(row.adapter for row in job.rows)
        case CreateAdapterJob():
            named = frozenset((job.init_from or BASE,))
        case (
            GenerateJob()
            | ForwardBackwardJob()
            | OptimStepJob()
            | DropGradientsJob()
            | SaveAdapterJob()
            | DeleteAdapterJob()
            | ClientStateJob()
        ):
            named = frozenset((job.adapter,))
        case _:
            named = frozenset()
    return named - {BASE}


# ------------------------------------------------------------------------------------------ what the worker tells


@dataclass(frozen=True)
class BaseFacts:
    """What the engine knows of the base."""

    model: str
    architecture: str
    fingerprint: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_context: int
    dtype: str
    device: str
    parameter_count: int
    weights_bytes: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    bos_token_id: int | None
    quantization: str = "none"  # none, int8 or nf4: how the linear layers' weights are kept
    exact: bool = False  # whether Generate's logprobs and values equal Logprob's bit for bit
    chat_template: bool = False  # whether its tokenizer can render conversations

    @property
    def precision(self) -> str:
        """Of its weights, for people."""
        return precision(self.dtype, self.quantization)


def precision(dtype: str, quantization: str) -> str:
    """What a base's weights are kept in, for people."""
    return dtype if quantization == "none" else f"{quantization} with {dtype} products"


@dataclass(frozen=True)
class WorkerStatus:
    """What the worker is doing, at one moment."""

    waiting: Mapping[Work, int]
    running: Mapping[Work, int]
    generated_tokens_per_second: float
    scored_tokens_per_second: float
    trained_tokens_per_second: float
    engine_steps: int
    kv_cache_bytes: int
    kv_slots_used: int
    kv_slots: int
