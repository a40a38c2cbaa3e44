"""Settings of a training run: frozen dataclasses, checked once. Those of the algorithms are in `hyperparameters`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from onebase.trainer.hyperparameters import (
    DpoConfig,
    Given,
    GrpoConfig,
    Optimization,
    PpoConfig,
    ReinforcePpConfig,
    RlooConfig,
    SftConfig,
)
from onebase.trainer.parsing import require, require_above_zero, require_at_least


@dataclass(frozen=True)
class PolicyConfig:
    """The policy to train, and how to make it if it is not on the server."""

    name: str = "policy_1"
    """Its name: the session's active adapter."""
    create: bool = True
    """Make it, with a value head if PPO wants one, if it is not there; otherwise that is an error."""
    rank: int = 16
    """LoRA rank."""
    alpha: float = 32.0
    """LoRA alpha."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Linear layers to adapt, as PEFT names them."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    seed: int = 0
    """Seed of its random beginning."""

    def __post_init__(self) -> None:
        require(bool(self.name), "name", "is empty; name the policy to train")
        require(self.name != "base", "name", "'base' is the base model, which is not trained; name a policy")
        require_at_least(self, "rank", 1)


@dataclass(frozen=True)
class CriticConfig(PolicyConfig):
    """PPO's critic as an adapter of its own, and how to make it if it is not on the server."""

    name: str = "critic_1"
    """Its name."""
    create: bool = True
    """Make it if it is not there; otherwise that is an error."""
    init_from: str = ""
    """A reward adapter that it begins as a copy of, its LoRA shape and its score head included; empty begins as the
    base with a fresh value head, in the shape given here."""
    learning_rate: float | None = None
    """AdamW's learning rate; none is the policy's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learning_rate is not None:
            require_at_least(self, "learning_rate", 0)


@dataclass(frozen=True)
class PromptsConfig:
    """Where prompts come from."""

    path: str
    """A .jsonl, .json, .csv or .parquet file, a directory, or a data set's id on the hub."""
    column: str = "prompt"
    """The column that holds them: texts, lists of token ids, or conversations as TRL has them."""
    split: str = "train"
    """The split of a directory or of a data set on the hub."""
    max_tokens: int = 0
    """Keep only this many first tokens of prompts given as token ids; 0 keeps all."""

    def __post_init__(self) -> None:
        require(bool(self.path), "path", "is empty; name a file, a directory or a data set")
        require_at_least(self, "max_tokens", 0)


@dataclass(frozen=True)
class RewardTerm:
    """A reward adapter, or a label of one, and its share of the reward."""

    adapter: str
    """Its name on the server."""
    weight: float = 1.0
    """Its weight; a negative one turns the reward around."""
    label: int | None = None
    """Which of its labels; needed where it has several."""

    def __post_init__(self) -> None:
        require(math.isfinite(self.weight), "weight", f"{self.weight} is not a finite number")
        require(self.label is None or self.label >= 0, "label", f"{self.label} is not 0 or more")


@dataclass(frozen=True)
class GenerationConfig:
    """How completions are drawn. They are to be drawn from the policy itself: no filters, temperature 1."""

    max_new_tokens: int = 32
    """Most tokens of a completion."""
    min_new_tokens: int = 0
    """Tokens before which no completion ends."""
    temperature: float = 1.0
    """Softmax temperature."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest tokens whose mass reaches top_p; 1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less probable than min_p times the best; 0 keeps all."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion."""

    def __post_init__(self) -> None:
        require_at_least(self, "max_new_tokens", 1)
        require_at_least(self, "min_new_tokens", 0)
        require_above_zero(self, "temperature")
        require_at_least(self, "top_k", 0)
        require(0 < self.top_p <= 1, "top_p", f"{self.top_p} is not in (0, 1]")
        require(0 <= self.min_p < 1, "min_p", f"{self.min_p} is not in [0, 1)")
        require(
            self.min_new_tokens <= self.max_new_tokens,
            "min_new_tokens",
            f"{self.min_new_tokens} is more than max_new_tokens = {self.max_new_tokens}",
        )


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation: the mean reward of completions of fixed prompts with a fixed seed."""

    every: int = 0
    """Evaluate every so many steps; 0 only before and after the training."""
    samples: int = 32
    """Number of prompts; 0 does not evaluate at all."""
    seed: int = 1234
    """Seed of the completions."""

    def __post_init__(self) -> None:
        require_at_least(self, "every", 0)
        require_at_least(self, "samples", 0)
        require_at_least(self, "seed", 0)


@dataclass(frozen=True)
class LogConfig:
    """What is written down, besides metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    samples: int = 2
    """Completions of every step that go to samples.jsonl."""

    def __post_init__(self) -> None:
        require_at_least(self, "samples", 0)


@dataclass(frozen=True)
class TrainConfig:
    """A whole training run."""

    prompts: PromptsConfig
    """Prompts to train on."""
    server: str = "127.0.0.1:7070"
    """Address of the onebase server. Its token, if it wants one, is in the environment: ONEBASE_TOKEN."""
    tls_ca: str = ""
    """Talk TLS, and know the server by the certificates in this file (PEM); "system": by the system's."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The policy."""
    critic: CriticConfig | None = None
    """PPO's critic as an adapter of its own; without one it is the policy's value head."""
    reference: str = "base"
    """What the KL penalty holds to: "base" or a frozen adapter's name."""
    eval_prompts: PromptsConfig | None = None
    """Prompts to evaluate on; without them the first training prompts are taken."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""
    rewards: tuple[RewardTerm, ...] = ()
    """Reward adapters, summed by weight."""
    reward_function: str | None = None
    """A Python function, "module:function" or "path/to/file.py:function", whose result is added to the sum."""
    reward_function_weight: float = 1.0
    """The function's weight in the sum."""
    append_eos: bool | None = None
    """Append the end-of-sequence token for the rewards where it is missing; unset: as each adapter declares, and
    yes for one that declares nothing."""
    pooling: Literal["last_token", "last_not_pad"] | None = None
    """Where scores are read: at the last token, or before a last one that is the padding token; unset: as each reward
    adapter declares."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """Rollouts."""
    algorithm: Literal["ppo", "grpo", "rloo", "reinforce_pp", "sft", "dpo"] = "ppo"
    """What trains the policy; the section of that name holds its settings."""
    ppo: PpoConfig = field(default_factory=PpoConfig)
    """PPO."""
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    """GRPO."""
    rloo: RlooConfig = field(default_factory=RlooConfig)
    """RLOO."""
    reinforce_pp: ReinforcePpConfig = field(default_factory=ReinforcePpConfig)
    """REINFORCE++."""
    sft: SftConfig = field(default_factory=SftConfig)
    """Supervised fine-tuning; its prompts' rows hold the completions too, and rewards are only for evaluation."""
    dpo: DpoConfig = field(default_factory=DpoConfig)
    """DPO; its prompts' rows hold both completions, and rewards are only for evaluation."""
    steps: int = 100
    """Steps to train: batches of batch_size completions."""
    seed: int = 0
    """Seed of the prompts' order, the completions and the minibatches."""
    output_dir: str = ""
    """Where metrics, samples and the trainer's state go; empty is runs/<policy name>."""
    save_every: int = 0
    """Checkpoint every so many steps; 0 only at the end and when interrupted."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Go on from output_dir: if it holds a run, never, or fail if it holds none."""
    log: LogConfig = field(default_factory=LogConfig)
    """Logs."""

    def __post_init__(self) -> None:
        for key in ("steps", "seed", "save_every"):
            require_at_least(self, key, 0)
        require(
            self.has_rewards or isinstance(self.optimization, Given),
            "rewards",
            "is empty and there is no reward_function; name a reward adapter, as in [{adapter: NAME, weight: 1}]",
        )
        names = [term.adapter if term.label is None else f"{term.adapter}[{term.label}]" for term in self.rewards]
        for name in names:
            require(names.count(name) == 1, "rewards", f"{name!r} is named {names.count(name)} times; add its weights")
        if self.critic is not None:
            require(self.algorithm == "ppo", "critic", f"is PPO's, and {self.algorithm} has none; leave it out")
            require(self.critic.name != self.policy.name, "critic.name", f"{self.critic.name!r} is the policy's name")
        require(math.isfinite(self.reward_function_weight), "reward_function_weight", "is not a finite number")

    @property
    def has_rewards(self) -> bool:
        """Whether there is anything to judge completions by; without, nothing is evaluated."""
        return bool(self.rewards) or self.reward_function is not None

    @property
    def optimization(self) -> Optimization:
        """The section of the algorithm."""
        section: Optimization = getattr(self, self.algorithm)
        return section

    def total_steps(self, rows: int) -> int:
        """Steps to train on so many rows of prompts; an epoch's last batch is filled up from the next one."""
        section = self.optimization
        if isinstance(section, Given) and section.epochs is not None:
            return math.ceil(rows * section.epochs / section.batch_size)
        return self.steps

    @property
    def output_path(self) -> Path:
        """The directory of this run's files."""
        return Path(self.output_dir or f"runs/{self.policy.name}").resolve()

    @property
    def run_name(self) -> str:
        """The last part of output_path; names the run's checkpoints on the server."""
        return self.output_path.name
