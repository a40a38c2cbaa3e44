"""PPO over onebase's client: the loop, its settings, and one step of it for programs with a loop of their own.

Numpy only: the model, its gradients and its optimizer are the server's.
"""

from onebase.trainer.config import (
    EvalConfig,
    GenerationConfig,
    LogConfig,
    PolicyConfig,
    PpoConfig,
    PromptsConfig,
    RewardTerm,
    TrainConfig,
)
from onebase.trainer.loading import load_config
from onebase.trainer.parsing import ConfigError
from onebase.trainer.ppo import train
from onebase.trainer.stepper import PpoStepper

__all__ = [
    "ConfigError",
    "EvalConfig",
    "GenerationConfig",
    "LogConfig",
    "PolicyConfig",
    "PpoConfig",
    "PpoStepper",
    "PromptsConfig",
    "RewardTerm",
    "TrainConfig",
    "load_config",
    "train",
]
