"""The algorithms, a file each: what they make of a batch of scored completions, over the same client.

None of them knows where prompts, completions and scores come from (`onebase.trainer.learners` does), and none holds a
model: gradients and optimizer are the server's, and everything between is arithmetic here.
"""

from onebase.trainer.algorithms.dpo import DpoStepper
from onebase.trainer.algorithms.grpo import GrpoStepper
from onebase.trainer.algorithms.ppo import PpoStepper
from onebase.trainer.algorithms.reinforce_pp import ReinforcePpStepper
from onebase.trainer.algorithms.rloo import RlooStepper
from onebase.trainer.algorithms.sft import SftStepper

__all__ = ["DpoStepper", "GrpoStepper", "PpoStepper", "ReinforcePpStepper", "RlooStepper", "SftStepper"]
