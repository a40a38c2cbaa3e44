"""What the client takes and gives: frozen dataclasses and numpy arrays, never protobuf.

Shapes: a sequence has a prompt and a completion of t tokens; every per-token array is float32 of shape [t], the
number that belongs to each completion token.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Tokens: TypeAlias = "NDArray[np.integer[Any]] | SequenceABC[int]"
Floats: TypeAlias = "NDArray[np.float32]"

AdapterKind: TypeAlias = Literal["policy", "reward", "reference", "critic"]
Pooling: TypeAlias = Literal["last_token", "last_not_pad"]
"""Where a score is read: at the last token, or at the last one that is not the padding token, as transformers' sequence
classifiers do."""
FinishReason: TypeAlias = Literal["eos", "stop_string", "stop_token", "length"]
ScoreOutput: TypeAlias = Literal["logprobs", "reference_logprobs", "values", "rewards", "entropy"]

BASE = "base"
"""The name that means the base with no adapter."""


@dataclass(frozen=True)
class ChatMessage:
    """One message of a conversation."""

    role: str
    """Who says it, as the base's chat template knows it: "system", "user", "assistant", …"""
    content: str
    """What is said."""


Chat: TypeAlias = "SequenceABC[ChatMessage | Mapping[str, Any]]"
"""A conversation, at least one message; {"role": …, "content": …} is one too, as transformers and TRL write it."""

Content: TypeAlias = "str | NDArray[np.integer[Any]] | SequenceABC[int] | Chat"
"""A text, token ids of the base model, or a conversation that the base's chat template turns into tokens."""


@dataclass(frozen=True)
class Sequence:
    """A prompt and what followed it, each as text, token ids or a conversation.

    A completion may be a conversation where the prompt is one, and means what the chat template adds for it. For
    rewards both are rendered as one, and the prompt may be empty ([]).
    """

    prompt: Content
    completion: Content


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn; filters apply in the order temperature, top_k, top_p, min_p."""

    max_new_tokens: int = 64
    """Most tokens to write."""
    n: int = 1
    """Completions per prompt."""
    temperature: float = 1.0
    """Softmax temperature; 0 is greedy."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest tokens whose mass reaches top_p."""
    min_p: float = 0.0
    """Drop tokens less probable than min_p times the best."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a completion, besides the model's own."""
    seed: int | None = None
    """A completion depends only on weights, prompt, these parameters, the seed and its indexes; None draws one."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token."""
    min_new_tokens: int = 0
    """Tokens before which no end-of-sequence or stop token is drawn."""


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
class AdapterVersion:
    """An adapter and the version that answered."""

    name: str
    version: int


@dataclass(frozen=True)
class Adapter:
    """An adapter on the server, at one moment."""

    name: str
    kind: AdapterKind
    version: int
    lora: LoraSpec
    value_head: bool
    num_labels: int
    parameter_count: int
    weights_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    old_version_bytes: int
    leased: bool
    pending_gradients: int
    create_time: float
    source: str
    append_eos: bool | None = None
    """Whether a reward adapter declares that it reads an end-of-sequence token behind a text; None says nothing."""
    pooling: Pooling | None = None
    """Where a reward adapter's score is read; None for other kinds."""
    durable_version: int | None = None
    """The newest version that would be there after a crash; None where nothing outlives the server."""

    @property
    def total_bytes(self) -> int:
        """Device memory in bytes: weights, gradients, moments and old versions."""
        return self.weights_bytes + self.gradient_bytes + self.optimizer_bytes + self.old_version_bytes


@dataclass(frozen=True)
class Completion:
    """A finished completion of one prompt."""

    prompt_index: int
    completion_index: int
    text: str
    tokens: NDArray[np.int32]  # [t]
    logprobs: Floats | None  # [t], at temperature 1
    values: Floats | None  # [t]
    finish_reason: FinishReason
    adapter: AdapterVersion
    seed: int
    prompt_tokens: int


@dataclass(frozen=True)
class CompletionChunk:
    """A piece of a completion as it is written; the last one has a finish_reason."""

    prompt_index: int
    completion_index: int
    text: str
    tokens: NDArray[np.int32]
    logprobs: Floats | None
    values: Floats | None
    finish_reason: FinishReason | None
    adapter: AdapterVersion
    seed: int
    prompt_tokens: int


@dataclass(frozen=True)
class Logprobs:
    """Logprobs of one sequence's completion."""

    logprobs: Floats  # [t]
    entropy: Floats | None  # [t], nats
    values: Floats | None  # [t]
    completion_tokens: NDArray[np.int32] | None  # [t], where the completion was not given as ids
    adapter: AdapterVersion
    logits: Floats | None = None  # [t, vocabulary]


@dataclass(frozen=True)
class RewardTerm:
    """A reward adapter, or a label of one, and its share of the reward."""

    adapter: str
    """Its name on the server."""
    weight: float = 1.0
    """Its weight in the sum; a negative one turns the reward around."""
    label: int | None = None
    """Which of its labels; needed where it has several."""

    @property
    def key(self) -> str:
        """What results call it: "adapter", or "adapter[label]" where a label is named."""
        return self.adapter if self.label is None else f"{self.adapter}[{self.label}]"


@dataclass(frozen=True)
class Reward:
    """Scores of one sequence. A term is called "adapter", or "adapter[label]" where a label was named."""

    scores: Mapping[str, float]
    """Raw score by term, read where the pooling rule says."""
    token_scores: Mapping[str, Floats] | None
    """Score at every token of prompt and completion, [tokens], by term, if asked for."""
    reward: float
    """The weighted sum of the scores."""
    tokens: Mapping[str, int]
    """Number of tokens that were read, an appended end-of-sequence token included, by term."""
    eos_appended: Mapping[str, bool]
    """Whether an end-of-sequence token was appended, by term."""
    versions: Mapping[str, int]
    """Version of the adapter, by term."""

    @property
    def score(self) -> float:
        """The only score; ValueError if there are several terms."""
        if len(self.scores) != 1:
            raise ValueError(f"{len(self.scores)} reward terms answered ({', '.join(self.scores)}); use .scores")
        return next(iter(self.scores.values()))


@dataclass(frozen=True)
class Score:
    """PPO's numbers for one sequence; what was not asked for is None."""

    logprobs: Floats | None  # [t], policy
    reference_logprobs: Floats | None  # [t]
    values: Floats | None  # [t]
    entropy: Floats | None  # [t], nats
    scores: Mapping[str, float]  # raw, by reward term: "adapter", or "adapter[label]" where a label was named
    reward: float  # weighted sum of the scores
    completion_tokens: NDArray[np.int32] | None
    eos_appended: Mapping[str, bool]  # by reward term
    policy: AdapterVersion
    reference: AdapterVersion
    critic: AdapterVersion | None = None  # the critic that gave the values, if one was named


@dataclass(frozen=True)
class TrainingSequence:
    """A sequence to train on; arrays have one number per completion token.

    Each loss says which arrays it needs. What it needs and is not given, or is given and does not use, is refused.
    """

    prompt: Content
    completion: Content
    old_logprobs: Floats | None = None
    """Logprobs under the policy that sampled."""
    old_values: Floats | None = None
    """Values at that time."""
    advantages: Floats | None = None
    returns: Floats | None = None
    mask: NDArray[np.bool_] | None = None
    """Which tokens count; None counts all."""
    reference_logprobs: Floats | None = None
    """Logprobs under the reference."""
    weights: Floats | None = None
    """What each token's term weighs in the loss's sum; None is 1. They do not change the denominator."""
    logprob_gradients: Floats | None = None
    """d loss / d logprob of each token."""
    value_gradients: Floats | None = None
    """d loss / d value before each token."""
    entropy_gradients: Floats | None = None
    """d loss / d entropy before each token."""


@dataclass(frozen=True)
class PpoLoss:
    """The clipped PPO loss, with TRL 0.11.4's defaults: old_logprobs, advantages, old_values, returns.

    Without a vf_coef no value head is needed, and old_values and returns only give statistics.
    """

    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    """Weight of the value loss."""
    ratio_threshold: float = 10.0
    """A batch whose mean ratio exceeds this adds zero gradients."""
    cliprange_high: float | None = None
    """The upper clip range of the ratio; None is cliprange."""
    kl_coef: float = 0.0
    """Weight of exp(d) - d - 1 with d = reference_logprobs - logprobs, which are then needed."""
    entropy_coef: float = 0.0
    """Weight of the entropy, which is subtracted."""


@dataclass(frozen=True)
class ImportanceSamplingLoss:
    """The policy gradient with importance sampling, -A·ratio, not clipped: old_logprobs and advantages."""


@dataclass(frozen=True)
class CrossEntropyLoss:
    """The negative logprob of every token that counts: supervised fine-tuning. It needs no array."""


@dataclass(frozen=True)
class DpoLoss:
    """Direct preference optimization: reference_logprobs, of sequences in pairs, chosen then rejected."""

    beta: float = 0.1
    """How strongly to hold to the reference."""
    label_smoothing: float = 0.0
    """Share of the pairs that may be labelled the wrong way round, in [0, 0.5)."""


@dataclass(frozen=True)
class CustomLoss:
    """The client's own loss, by its derivatives: one or several of logprob_, value_ and entropy_gradients.

    They are derivatives of a sum: unless a denominator is given, nothing divides them.
    """


@dataclass(frozen=True)
class ValueLoss:
    """The clipped value loss alone, for a critic: old_values and returns. Its pass gives no logprobs."""

    cliprange_value: float = 0.2


Loss: TypeAlias = PpoLoss | ImportanceSamplingLoss | CrossEntropyLoss | DpoLoss | CustomLoss | ValueLoss
"""What a forward and backward pass can compute."""


@dataclass(frozen=True)
class AdamW:
    """Settings of one AdamW step (Loshchilov and Hutter 2019); weight_decay 0 is Adam."""

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True)
class ForwardBackward:
    """What a forward and backward pass gave."""

    adapter: AdapterVersion
    metrics: Mapping[str, float]
    """loss/total and the loss's other numbers, for PPO under TRL's names without "ppo/": policy/approxkl, …"""
    logprobs: tuple[Floats, ...]
    """[t] per sequence; none from a ValueLoss."""
    values: tuple[Floats, ...]
    """[t] per sequence; none without a value head."""
    ratio_threshold_exceeded: bool
    pending_gradients: int
    entropy: tuple[Floats, ...] = ()
    """[t] per sequence, nats; none from a ValueLoss."""


@dataclass(frozen=True)
class OptimStep:
    """What an optimizer step gave."""

    adapter: AdapterVersion
    grad_norm: float
    gradients_applied: int


@dataclass(frozen=True)
class ClientState:
    """What a trainer has left with its adapter, and with which version; empty where it has left nothing."""

    adapter: AdapterVersion
    data: bytes


@dataclass(frozen=True)
class SavedAdapter:
    """Where an adapter was written."""

    path: str
    adapter: AdapterVersion
    bytes: int


@dataclass(frozen=True)
class SessionInfo:
    """A session as the server knows it."""

    session_id: str
    ppo_adapter_name: str
    label: str
    leases: tuple[str, ...]
    ttl_seconds: float


@dataclass(frozen=True)
class BaseModel:
    """The base model of a server."""

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
    quantization: str
    """How the weights of its linear layers are kept: none (in its dtype), int8 or nf4."""
    exact: bool
    """Whether Generate's logprobs and values are Logprob's bit for bit: then PPO takes its old ones from there."""
    chat_template: bool
    """Whether its tokenizer can render conversations."""


@dataclass(frozen=True)
class ServerLimits:
    """Limits that a request must keep."""

    max_sequences_per_request: int
    max_tokens_per_request: int
    max_queued_requests: int
    max_queued_requests_per_session: int
    max_rank: int
    max_message_bytes: int
    max_upload_bytes: int


@dataclass(frozen=True)
class ServerInfo:
    """What does not change while a server runs."""

    version: str
    base: BaseModel
    limits: ServerLimits
    reward_adapters: tuple[str, ...]


@dataclass(frozen=True)
class SessionStatus:
    """A session as everybody may see it."""

    label: str
    ppo_adapter_name: str
    leases: tuple[str, ...]
    requests_in_flight: int
    age_seconds: float
    idle_seconds: float


@dataclass(frozen=True)
class QueueStatus:
    """Requests of one kind of work."""

    work: str
    waiting: int
    running: int


@dataclass(frozen=True)
class ServerStatus:
    """What a server is doing now."""

    uptime_seconds: float
    sessions: tuple[SessionStatus, ...]
    adapters: tuple[Adapter, ...]
    queues: tuple[QueueStatus, ...]
    generated_tokens_per_second: float
    scored_tokens_per_second: float
    trained_tokens_per_second: float
    engine_steps: int
    rss_bytes: int
    peak_rss_bytes: int
    base_bytes: int
    kv_cache_bytes: int
    kv_slots_used: int
    kv_slots: int
