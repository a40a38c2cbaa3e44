"""Online RL over onebase's client: the loop, its settings, and each algorithm's step for programs with their own loop.

Numpy only: the model, its gradients and its optimizer are the server's.
"""

from onebase.trainer.algorithms import DpoStepper, GrpoStepper, PpoStepper, ReinforcePpStepper, RlooStepper, SftStepper
from onebase.trainer.config import (
    CriticConfig,
    EvalConfig,
    GenerationConfig,
    LogConfig,
    PolicyConfig,
    PromptsConfig,
    RewardTerm,
    TrainConfig,
)
from onebase.trainer.hyperparameters import DpoConfig, GrpoConfig, PpoConfig, ReinforcePpConfig, RlooConfig, SftConfig
from onebase.trainer.loading import load_config
from onebase.trainer.loop import train
from onebase.trainer.parsing import ConfigError

__all__ = [
    "ConfigError",
    "CriticConfig",
    "DpoConfig",
    "DpoStepper",
    "EvalConfig",
    "GenerationConfig",
    "GrpoConfig",
    "GrpoStepper",
    "LogConfig",
    "PolicyConfig",
    "PpoConfig",
    "PpoStepper",
    "PromptsConfig",
    "ReinforcePpConfig",
    "ReinforcePpStepper",
    "RewardTerm",
    "RlooConfig",
    "RlooStepper",
    "SftConfig",
    "SftStepper",
    "TrainConfig",
    "load_config",
    "train",
]
