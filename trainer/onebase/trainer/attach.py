"""Finds, makes or brings back the policy, and takes its lease: how a run begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onebase.client.errors import NotFoundError
from onebase.client.types import Adapter, LoraSpec
from onebase.trainer.checkpoint import TrainerState
from onebase.trainer.config import PolicyConfig
from onebase.trainer.parsing import ConfigError

if TYPE_CHECKING:
    from onebase.client import Client, Session

LEASE_SECONDS = 60.0
"""How long the session outlives a trainer that dies."""


def attach(
    client: Client, policy: PolicyConfig, state: TrainerState | None, *, value_head: bool = True
) -> tuple[Session, str]:
    """Opens the session that trains the policy.

    Args:
        client: connected to the server.
        policy: the policy's settings.
        state: the run to go on with, or None to begin with the policy as it is.
        value_head: whether the algorithm needs the policy to have one.

    Returns:
        The session, whose active adapter is the policy, and a sentence on where the policy came from.

    Raises:
        ConfigError: the policy is not there and shall not be made, cannot be trained, or cannot be brought back.
    """
    session = client.open_session(
        ppo_adapter_name=policy.name if find(client, policy.name) else "",
        label=f"train {policy.name}"[:100],
        ttl=LEASE_SECONDS,
        resume=state.session_id if state else "",
        wait=LEASE_SECONDS + 10,  # a trainer that died holds the lease no longer than this
    )
    try:
        there = find(client, policy.name)  # looked at again: until the lease was ours, others could train it
        origin = _bring_back(session, policy, state, there) if state else _begin(session, policy, there, value_head)
        if session.ppo_adapter_name != policy.name:
            session.set_active(policy.name)
    except BaseException:
        session.close()
        raise
    return session, origin


def find(client: Client, name: str) -> Adapter | None:
    """The server's adapter of this name, if there is one."""
    try:
        return client.adapter(name)
    except NotFoundError:
        return None


def _begin(session: Session, policy: PolicyConfig, there: Adapter | None, value_head: bool) -> str:
    if there is None:
        if not policy.create:
            raise ConfigError(
                "policy.name", f"{policy.name!r} is not on the server; load it there, or set create: true"
            )
        lora = LoraSpec(
            rank=policy.rank,
            alpha=policy.alpha,
            target_modules=policy.target_modules,
            use_rslora=policy.use_rslora,
        )
        session.create_adapter(policy.name, lora, value_head=value_head, seed=policy.seed)
        return f"made {policy.name} (rank {policy.rank})"
    if there.kind != "policy":
        raise ConfigError("policy.name", f"{policy.name!r} is a {there.kind} adapter, which is not trained")
    if value_head and not there.value_head:
        raise ConfigError("policy.name", f"{policy.name!r} has no value head, which PPO needs; load it with one")
    return f"found {policy.name} on the server, version {there.version}"


def _bring_back(session: Session, policy: PolicyConfig, state: TrainerState, there: Adapter | None) -> str:
    if state.is_on_server(there):
        return f"going on after step {state.step}: {policy.name} is on the server as it was left"
    if not state.adapter_path:
        raise ConfigError(
            "resume",
            f"{policy.name} is not on the server as step {state.step} left it, and the server could not save it; "
            "use resume: never; a server started with --root DIR saves its adapters",
        )
    session.load_adapter(policy.name, state.adapter_path, replace=there is not None, with_optimizer=True)
    return f"going on after step {state.step}: {policy.name} was read from {state.adapter_path}"
