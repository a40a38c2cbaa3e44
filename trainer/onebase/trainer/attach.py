"""Finds, makes or brings back the policy, and takes its lease: how a run begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onebase.client.errors import NotFoundError
from onebase.client.types import Adapter, AdapterKind, LoraSpec
from onebase.trainer.checkpoint import AdapterMark, TrainerState
from onebase.trainer.config import CriticConfig, PolicyConfig
from onebase.trainer.parsing import ConfigError

if TYPE_CHECKING:
    from onebase.client import Client, Session

LEASE_SECONDS = 60.0
"""How long the session outlives a trainer that dies."""


def attach(
    client: Client, policy: PolicyConfig, state: TrainerState | None, *, last_session: str = "", value_head: bool = True
) -> tuple[Session, str]:
    """Opens the session that trains the policy.

    Args:
        client: connected to the server.
        policy: the policy's settings.
        state: the run to go on with, or None to begin with the policy as it is.
        last_session: the session of the last run in this place, which may have died with it in its hands; "" if none.
        value_head: whether the algorithm needs the policy to have one.

    Returns:
        The session, whose active adapter is the policy, and a sentence on where the policy came from.

    Raises:
        ConfigError: the policy is not there and shall not be made, cannot be trained, or cannot be brought back.
    """
    if last_session and state is None:  # its gradients are nothing to build upon
        client.open_session(resume=last_session).close()
    session = client.open_session(
        ppo_adapter_name=policy.name if find(client, policy.name) else "",
        label=f"train {policy.name}"[:100],
        ttl=LEASE_SECONDS,
        resume=last_session if state else "",
        wait=LEASE_SECONDS + 10,  # a trainer that died elsewhere holds the lease no longer than this
    )
    try:
        there = find(client, policy.name)  # looked at again: until the lease was ours, others could train it
        origin = (
            _bring_back(session, policy.name, state, state.adapter, there)
            if state
            else _begin(session, policy, there, value_head)
        )
        if session.ppo_adapter_name != policy.name:
            session.set_active(policy.name)
    except BaseException:
        session.close()
        raise
    return session, origin


def attach_critic(client: Client, session: Session, critic: CriticConfig, state: TrainerState | None) -> str:
    """Finds, makes or brings back the critic, whose lease the session takes; returns where it came from.

    Raises:
        ConfigError: it is not there and shall not be made, is no critic, or cannot be brought back.
    """
    there = find(client, critic.name)
    if state is not None and state.critic is not None:
        return _bring_back(session, critic.name, state, state.critic, there)
    if there is None:
        _may_create(critic, "critic")
        lora = None if critic.init_from else _lora(critic)
        session.create_adapter(critic.name, lora, kind="critic", init_from=critic.init_from, seed=critic.seed)
        return f"made {critic.name} " + (f"from {critic.init_from}" if critic.init_from else f"(rank {critic.rank})")
    if there.kind != "critic":
        raise ConfigError("critic.name", f"{critic.name!r} is a {there.kind} adapter, not a critic")
    return f"found {critic.name} on the server, version {there.version}"


def find(client: Client, name: str) -> Adapter | None:
    """The server's adapter of this name, if there is one."""
    try:
        return client.adapter(name)
    except NotFoundError:
        return None


def _begin(session: Session, policy: PolicyConfig, there: Adapter | None, value_head: bool) -> str:
    if there is None:
        _may_create(policy, "policy")
        session.create_adapter(policy.name, _lora(policy), value_head=value_head, seed=policy.seed)
        return f"made {policy.name} (rank {policy.rank})"
    if there.kind != "policy":
        raise ConfigError("policy.name", f"{policy.name!r} is a {there.kind} adapter, which is not trained")
    if value_head and not there.value_head:
        raise ConfigError("policy.name", f"{policy.name!r} has no value head, which PPO needs; load it with one")
    return f"found {policy.name} on the server, version {there.version}"


def _may_create(adapter: PolicyConfig, key: str) -> None:
    if not adapter.create:
        raise ConfigError(f"{key}.name", f"{adapter.name!r} is not on the server; load it there, or set create: true")


def _lora(adapter: PolicyConfig) -> LoraSpec:
    return LoraSpec(
        rank=adapter.rank,
        alpha=adapter.alpha,
        target_modules=adapter.target_modules,
        use_rslora=adapter.use_rslora,
    )


def _bring_back(session: Session, name: str, state: TrainerState, mark: AdapterMark, there: Adapter | None) -> str:
    if mark.is_on_server(there):
        return f"going on after step {state.step}: {name} is on the server as it was left"
    if not mark.path:
        raise ConfigError(
            "resume",
            f"{name} is not on the server as step {state.step} left it, and the server could not save it; "
            "use resume: never; a server started with --root DIR saves its adapters",
        )
    kind: AdapterKind = "policy" if mark is state.adapter else "critic"
    session.load_adapter(name, mark.path, kind=kind, replace=there is not None, with_optimizer=True)
    return f"going on after step {state.step}: {name} was read from {mark.path}"
