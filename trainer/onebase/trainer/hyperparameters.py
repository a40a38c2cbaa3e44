"""Every algorithm's settings: a frozen dataclass each, checked once.

Names, meanings and defaults are those of TRL: PpoConfig's of 0.11.4, GrpoConfig's and RlooConfig's of its current
trainers. What all have in common has one name here: batch_size, mini_batch_size and gradient_accumulation_steps are
TRL's generation_batch_size, per_device_train_batch_size and gradient_accumulation_steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onebase.trainer.parsing import require, require_above_zero, require_at_least


@dataclass(frozen=True)
class Optimization:
    """How a batch is gone through."""

    learning_rate: float = 1e-6
    """AdamW's learning rate."""
    batch_size: int = 128
    """Completions per step."""
    mini_batch_size: int = 128
    """Completions per forward and backward pass."""
    max_grad_norm: float | None = 1.0
    """Clip every optimizer step's gradients to this global norm; none does not clip."""

    def __post_init__(self) -> None:
        for key in ("batch_size", "mini_batch_size"):
            require_at_least(self, key, 1)
        require_at_least(self, "learning_rate", 0)
        require_above_zero(self, "max_grad_norm")
        require(
            self.batch_size % self.mini_batch_size == 0,
            "batch_size",
            f"{self.batch_size} is not a multiple of mini_batch_size = {self.mini_batch_size}; set both together",
        )


@dataclass(frozen=True)
class OnPolicy(Optimization):
    """What all algorithms have that learn from their own completions."""

    gradient_accumulation_steps: int = 1
    """Passes per optimizer step; each loss is divided by this."""

    def __post_init__(self) -> None:
        require_at_least(self, "mini_batch_size", 1)
        require_at_least(self, "gradient_accumulation_steps", 1)
        optimized = self.mini_batch_size * self.gradient_accumulation_steps
        require(
            self.batch_size % optimized == 0,
            "batch_size",
            f"{self.batch_size} is not a multiple of mini_batch_size * gradient_accumulation_steps = "
            f"{self.mini_batch_size} * {self.gradient_accumulation_steps} = {optimized}; set all three together",
        )
        super().__post_init__()

    @property
    def completions_per_prompt(self) -> int:
        """How many completions a step draws of each prompt."""
        return 1


@dataclass(frozen=True)
class PpoConfig(OnPolicy):
    """PPO (Schulman et al. 2017) with a KL penalty to a reference (Ziegler et al. 2019), as TRL 0.11.4 has it."""

    learning_rate: float = 1.41e-5
    """AdamW's learning rate."""
    max_grad_norm: float | None = None
    """Clip every optimizer step's gradients to this global norm; none does not clip."""
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
    ppo_epochs: int = 4
    """Times that a step goes through its batch."""
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
        super().__post_init__()
        require(
            self.kl_penalty != "full",
            "kl_penalty",
            "'full' is not supported: it needs whole distributions, which the server does not send; use kl, abs or mse",
        )
        choices = ("kl", "abs", "mse")
        require(self.kl_penalty in choices, "kl_penalty", f"{self.kl_penalty!r} is not one of {', '.join(choices)}")
        require_at_least(self, "ppo_epochs", 1)
        for key in ("init_kl_coef", "vf_coef", "cliprange", "cliprange_value"):
            require_at_least(self, key, 0)
        for key in ("target", "horizon", "target_kl", "ratio_threshold", "score_clip"):
            require_above_zero(self, key)
        for key in ("gamma", "lam"):
            value = getattr(self, key)
            require(0 <= value <= 1, key, f"{value} is not in [0, 1]")


@dataclass(frozen=True)
class Clipped(OnPolicy):
    """What GRPO, RLOO and REINFORCE++ share: several passes over a batch, with PPO's clip and no critic."""

    num_iterations: int = 1
    """Times that a step goes through its batch."""
    epsilon: float = 0.2
    """Clip range of the probability ratio."""
    epsilon_high: float | None = None
    """Upper clip range, where it is another one (Yu et al. 2025); none is epsilon."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, "num_iterations", 1)
        require_above_zero(self, "epsilon")
        require_above_zero(self, "epsilon_high")


@dataclass(frozen=True)
class GrpoConfig(Clipped):
    """GRPO (Shao et al. 2024): a completion's advantage is its place among the others of its prompt."""

    num_generations: int = 8
    """Completions of each prompt, which make a group."""
    beta: float = 0.0
    """Weight of the KL penalty in the loss; 0 needs no reference."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: their group's standard deviation, the batch's, or nothing (Liu et al. 2025)."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    """How tokens weigh: "grpo" each completion alike, "bnpo" each token of a pass alike, "dapo" each token of the batch
    alike (Yu et al. 2025), "dr_grpo" as if all completions were of max_new_tokens (Liu et al. 2025)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, "beta", 0)
        _require_groups(self.batch_size, self.num_generations)

    @property
    def completions_per_prompt(self) -> int:
        """How many completions a step draws of each prompt."""
        return self.num_generations


@dataclass(frozen=True)
class RlooConfig(Clipped):
    """RLOO (Ahmadian et al. 2024): REINFORCE, whose baseline is the mean of the other completions of the prompt."""

    num_generations: int = 2
    """Completions of each prompt, which make a group."""
    beta: float = 0.05
    """Weight of the KL penalty in the reward; 0 needs no reference."""
    normalize_advantages: bool = False
    """Scale the batch's advantages to mean 0 and variance 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, "beta", 0)
        _require_groups(self.batch_size, self.num_generations)

    @property
    def completions_per_prompt(self) -> int:
        """How many completions a step draws of each prompt."""
        return self.num_generations


@dataclass(frozen=True)
class ReinforcePpConfig(Clipped):
    """REINFORCE++ (Hu 2025): token rewards summed to the end, normalized over the whole batch; no critic, no groups."""

    kl_coef: float = 0.01
    """Weight of each token's KL penalty in its reward."""
    gamma: float = 1.0
    """Discount per token."""
    score_clip: float | None = 10.0
    """Clip scores to plus and minus this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, "kl_coef", 0)
        require(0 <= self.gamma <= 1, "gamma", f"{self.gamma} is not in [0, 1]")
        require_above_zero(self, "score_clip")


@dataclass(frozen=True)
class Given(Optimization):
    """What SFT and DPO share: completions that come with the prompts."""

    batch_size: int = 32
    """Rows per optimizer step."""
    mini_batch_size: int = 32
    """Rows per forward and backward pass."""
    append_eos: bool = True
    """Put the end-of-sequence token behind completions that do not end with it."""
    epochs: int | None = None
    """Times through the rows, which then sets the number of steps; none leaves that to `steps`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is not None:
            require_at_least(self, "epochs", 1)
        for key in self.columns:
            require(bool(getattr(self, key)), key, "is empty; name the column of these completions")

    @property
    def columns(self) -> tuple[str, ...]:
        """The keys that name the prompts' columns with completions."""
        return ()


@dataclass(frozen=True)
class SftConfig(Given):
    """Supervised fine-tuning: the mean negative logprob of the completions that come with the prompts."""

    learning_rate: float = 2e-4
    """AdamW's learning rate."""
    completion_column: str = "completion"
    """The prompts' column that holds the completions: texts, or lists of token ids."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The keys that name the prompts' columns with completions."""
        return ("completion_column",)


@dataclass(frozen=True)
class DpoConfig(Given):
    """DPO (Rafailov et al. 2023): of two completions that come with a prompt, the chosen one becomes the likelier."""

    beta: float = 0.1
    """How strongly to hold to the reference."""
    label_smoothing: float = 0.0
    """Share of the pairs that may be labelled the wrong way round, in [0, 0.5)."""
    chosen_column: str = "chosen"
    """The prompts' column that holds the preferred completions: texts, or lists of token ids."""
    rejected_column: str = "rejected"
    """The column that holds the others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, "beta", f"{self.beta} is not above 0")
        smoothing = self.label_smoothing
        require(0 <= smoothing < 0.5, "label_smoothing", f"{smoothing} is not in [0, 0.5)")

    @property
    def columns(self) -> tuple[str, ...]:
        """The keys that name the prompts' columns with completions."""
        return ("chosen_column", "rejected_column")


def _require_groups(batch_size: int, num_generations: int) -> None:
    require(
        num_generations >= 2,
        "num_generations",
        f"{num_generations} is not 2 or more; a completion is compared with the others of its prompt",
    )
    require(
        batch_size % num_generations == 0,
        "num_generations",
        f"{num_generations} does not divide batch_size = {batch_size}; a step holds whole groups",
    )
