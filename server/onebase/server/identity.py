"""Who calls: the tenant, what its token may do, and which adapters it may see.

The guard says who calls before anything else happens; from there the caller goes with the call, also into the tasks
that it starts. What no call has started (the operator's own adapters, the sweeping of sessions) is the operator's, and
so is every call of a server without tokens.
"""

from __future__ import annotations

import enum
from contextvars import ContextVar
from dataclasses import dataclass

OPERATOR = "operator"
"""The tenant of whoever runs the server: of the adapters loaded at the start, and of everybody where no tokens are."""


class Scope(enum.Enum):
    """A family of methods that a token opens."""

    STATUS = "status"
    """What the server is doing."""
    GENERATE = "generate"
    """Completions."""
    REWARD = "reward"
    """Rewards, logprobs, and PPO's numbers."""
    TRAIN = "train"
    """Gradients, optimizer steps, and the leases that they need."""
    ADAPTERS = "adapters"
    """Making, loading, saving, sending and deleting adapters."""


@dataclass(frozen=True)
class Caller:
    """Whoever makes a call."""

    tenant: str
    token: str = ""
    """The token's id, which is no secret; empty where no tokens are."""
    scopes: frozenset[Scope] = frozenset(Scope)
    adapters: frozenset[str] = frozenset()
    """The only policies and critics that the token means; empty means all that are the tenant's."""

    def may_see(self, owner: str, name: str, *, trained: bool) -> bool:
        """Whether an adapter is there for this caller.

        Args:
            owner: the tenant whose adapter it is.
            name: the adapter.
            trained: whether it is a policy or a critic.
        """
        if owner not in (self.tenant, OPERATOR):
            return False
        return not (trained and self.adapters) or name in self.adapters

    def may_change(self, owner: str, name: str) -> bool:
        """Whether this caller may train, replace or delete an adapter that it sees, as far as owners go."""
        return owner == self.tenant or name in self.adapters


_THE_OPERATOR = Caller(OPERATOR)
_current: ContextVar[Caller] = ContextVar("onebase_caller", default=_THE_OPERATOR)


def caller() -> Caller:
    """Who makes the call that runs now; the operator where none does."""
    return _current.get()


def set_caller(who: Caller) -> None:
    """Says who makes this call, and what is started from here on."""
    _current.set(who)


def tenant_problem(name: str) -> str | None:
    """What keeps `name` from being a tenant's name, or None if nothing does."""
    if not name or len(name) > 64 or not name.isascii() or not name.replace("-", "").replace("_", "").isalnum():
        return "is not a name: use up to 64 letters, digits, '_' and '-'"
    return None
