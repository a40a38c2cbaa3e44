"""Settings of a training run: frozen dataclasses, checked once.

The `ppo` section has the names, the meanings and the defaults of TRL 0.11.4's PPOConfig.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from onebase.trainer.parsing import require


@dataclass(frozen=True)
class PpoConfig:
    """PPO (Schulman et al. 2017) with a KL penalty to a reference (Ziegler et al. 2019), as TRL 0.11.4 has it."""

    learning_rate: float = 1.41e-5
    """Adam's learning rate."""
    adap_kl_ctrl: bool = True
    """Adapt the KL coefficient towards `target`; otherwise it stays at init_kl_coef."""
    init_kl_coef: float = 0.2
    """KL coefficient at the beginning."""
    kl_penalty: str = "kl"
    """Penalty per token: "kl" is logp - ref_logp, "abs" its absolute value, "mse" half its square."""
    target: float = 6.0
    """KL per sequence, in nats, that the adaptive coefficient aims at."""
    horizon: float = 10000.0
    """Sequences over which the coefficient adapts."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """Lambda of generalized advantage estimation (Schulman et al. 2015)."""
    cliprange: float = 0.2
    """Clip range of the probability ratio."""
    cliprange_value: float = 0.2
    """Clip range of the value."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    batch_size: int = 128
    """Completions per step."""
    mini_batch_size: int = 128
    """Completions per forward and backward pass."""
    gradient_accumulation_steps: int = 1
    """Passes per optimizer step; each loss is divided by this."""
    ppo_epochs: int = 4
    """Times that a step goes through its batch."""
    max_grad_norm: float | None = None
    """Clip every optimizer step's gradients to this global norm; none does not clip."""
    early_stopping: bool = False
    """Leave out a step's remaining epochs once the last pass's policy KL exceeds 1.5 times target_kl."""
    target_kl: float = 1.0
    """See early_stopping."""
    ratio_threshold: float = 10.0
    """A pass whose mean ratio exceeds this gives zero gradients."""
    use_score_scaling: bool = False
    """Divide scores by their running standard deviation."""
    use_score_norm: bool = False
    """With use_score_scaling: also subtract their running mean."""
    score_clip: float | None = None
    """Clip scores to plus and minus this."""
    whiten_rewards: bool = False
    """Scale token rewards to unit variance before the advantages."""

    def __post_init__(self) -> None:
        require(
            self.kl_penalty != "full",
            "kl_penalty",
            "'full' is not supported: it needs whole distributions, which the server does not send; use kl, abs or mse",
        )
        choices = ("kl", "abs", "mse")
        require(self.kl_penalty in choices, "kl_penalty", f"{self.kl_penalty!r} is not one of {', '.join(choices)}")
        for key in ("batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs"):
            _at_least(self, key, 1)
        for key in ("learning_rate", "init_kl_coef", "vf_coef", "cliprange", "cliprange_value"):
            _at_least(self, key, 0)
        for key in ("target", "horizon", "target_kl", "ratio_threshold", "max_grad_norm", "score_clip"):
            _above_zero(self, key)
        for key in ("gamma", "lam"):
            value = getattr(self, key)
            require(0 <= value <= 1, key, f"{value} is not in [0, 1]")
        optimized = self.mini_batch_size * self.gradient_accumulation_steps
        require(
            self.batch_size % optimized == 0,
            "batch_size",
            f"{self.batch_size} is not a multiple of mini_batch_size * gradient_accumulation_steps = "
            f"{self.mini_batch_size} * {self.gradient_accumulation_steps} = {optimized}; set all three together",
        )


@dataclass(frozen=True)
class PolicyConfig:
    """The policy to train, and how to make it if it is not on the server."""

    name: str = "policy_1"
    """Its name: the session's active adapter."""
    create: bool = True
    """Make it, with a value head, if it is not there; otherwise that is an error."""
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
        _at_least(self, "rank", 1)


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
        _at_least(self, "max_tokens", 0)


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
    """How completions are drawn. PPO wants them drawn from the policy itself: no filters, temperature 1."""

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
        _at_least(self, "max_new_tokens", 1)
        _at_least(self, "min_new_tokens", 0)
        _above_zero(self, "temperature")
        _at_least(self, "top_k", 0)
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
        _at_least(self, "every", 0)
        _at_least(self, "samples", 0)
        _at_least(self, "seed", 0)


@dataclass(frozen=True)
class LogConfig:
    """What is written down, besides metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    samples: int = 2
    """Completions of every step that go to samples.jsonl."""

    def __post_init__(self) -> None:
        _at_least(self, "samples", 0)


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
    ppo: PpoConfig = field(default_factory=PpoConfig)
    """PPO."""
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
            _at_least(self, key, 0)
        require(
            bool(self.rewards) or self.reward_function is not None,
            "rewards",
            "is empty and there is no reward_function; name a reward adapter, as in [{adapter: NAME, weight: 1}]",
        )
        names = [term.adapter if term.label is None else f"{term.adapter}[{term.label}]" for term in self.rewards]
        for name in names:
            require(names.count(name) == 1, "rewards", f"{name!r} is named {names.count(name)} times; add its weights")
        require(math.isfinite(self.reward_function_weight), "reward_function_weight", "is not a finite number")

    @property
    def output_path(self) -> Path:
        """The directory of this run's files."""
        return Path(self.output_dir or f"runs/{self.policy.name}").resolve()

    @property
    def run_name(self) -> str:
        """The last part of output_path; names the run's checkpoints on the server."""
        return self.output_path.name


def _at_least(config: object, key: str, least: float) -> None:
    value = getattr(config, key)
    require(math.isfinite(value) and value >= least, key, f"{value} is not {least} or more")


def _above_zero(config: object, key: str) -> None:
    value = getattr(config, key)
    require(value is None or (math.isfinite(value) and value > 0), key, f"{value} is not above 0")
