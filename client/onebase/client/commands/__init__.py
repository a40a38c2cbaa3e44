"""The client's subcommands of `onebase`."""

from onebase.client.commands.adapters_command import adapters
from onebase.client.commands.generate_command import generate
from onebase.client.commands.reward_command import reward
from onebase.client.commands.status_command import status

__all__ = ["adapters", "generate", "reward", "status"]
