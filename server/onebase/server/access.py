"""Which adapter a request means, and whether its session may do that with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from onebase.server.errors import Aborted, FailedPrecondition, InvalidArgument
from onebase.server.identity import Scope, caller
from onebase.server.jobs import BASE, AdapterKind
from onebase.server.leases import Session, Sessions
from onebase.server.names import BASE_NAME
from onebase.server.registry import Entry, Registry


class Named(Protocol):
    """An adapter that a request means: an entry of the registry, or the bare base."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def uid(self) -> int:
        """What jobs call it."""
        ...


@dataclass(frozen=True)
class Bare:
    """The base with no adapter."""

    name: str = BASE_NAME
    uid: int = BASE


class Access:
    """Answers for one server which adapter is meant."""

    def __init__(self, registry: Registry, sessions: Sessions) -> None:
        self._registry = registry
        self._sessions = sessions

    def readable(self, session: Session | None, name: str, version: int | None) -> Named:
        """The adapter to sample or score: `adapter` of the request, or the session's active one, or the base.

        Raises:
            InvalidArgument: no name and no session; or a bad name.
            NotFound: ADAPTER_NOT_FOUND.
            FailedPrecondition: WRONG_ADAPTER_KIND for a reward adapter or a critic; NO_ACTIVE_ADAPTER.
            Aborted: VERSION_MISMATCH where the base is asked for another version than 0.
        """
        if name == BASE_NAME:
            if version:
                raise Aborted(
                    "VERSION_MISMATCH", f"adapter_version is {version}, but the base's is always 0: leave it out"
                )
            return Bare()
        entry = self._named_or_active(session, name, "adapter")
        if entry.kind in (AdapterKind.REWARD, AdapterKind.CRITIC):
            raise _wrong_kind(entry.name, entry.kind.value, "a policy or a reference", "adapter")
        return entry

    def policy(self, session: Session | None, name: str, field: str) -> Entry:
        """A policy: the named one, or the session's active one.

        Raises:
            InvalidArgument, NotFound, FailedPrecondition: as `readable`, for anything but a policy.
        """
        if name == BASE_NAME:
            raise _wrong_kind(BASE_NAME, "the base with no", "a policy", field)
        entry = self._named_or_active(session, name, field)
        if entry.kind is not AdapterKind.POLICY:
            raise _wrong_kind(entry.name, entry.kind.value, "a policy", field)
        return entry

    def trainable(self, session: Session | None, name: str, field: str) -> Entry:
        """A policy or a critic: the named one, or the session's active policy.

        Raises:
            InvalidArgument, NotFound, FailedPrecondition: as `readable`, for what is frozen.
        """
        if name == BASE_NAME:
            raise _wrong_kind(BASE_NAME, "the base with no", "a policy or a critic", field)
        entry = self._named_or_active(session, name, field)
        if not entry.kind.trained:
            raise _wrong_kind(entry.name, entry.kind.value, "a policy or a critic", field)
        return entry

    def critic(self, name: str) -> Entry:
        """The critic of that name.

        Raises:
            InvalidArgument: a bad name.
            NotFound: ADAPTER_NOT_FOUND.
            FailedPrecondition: WRONG_ADAPTER_KIND.
        """
        if name == BASE_NAME:
            raise _wrong_kind(BASE_NAME, "the base with no", "a critic", "critic")
        entry = self._registry.get(name, "critic", AdapterKind.CRITIC)
        if entry.kind is not AdapterKind.CRITIC:
            raise _wrong_kind(name, entry.kind.value, "a critic", "critic")
        return entry

    def activate(self, session: Session | None, name: str) -> None:
        """Makes a policy the session's active adapter from here on, whatever becomes of the call; takes no lease.

        Raises:
            InvalidArgument: there is no session; or a bad name.
            NotFound, FailedPrecondition: as `policy`; then nothing has changed.
        """
        field = "ppo_adapter_name"
        if session is None:
            raise InvalidArgument(
                "REQUIRED",
                f"session_id is empty, so no session could have {name!r} as its active adapter: open a session, or "
                f"leave {field} empty",
                field="session_id",
            )
        self._sessions.activate(session, self.policy(session, name, field).name)

    def check_lease(self, session: Session | None, name: str) -> Entry:
        """A policy whose lease the session could take, if the caller takes leases at all; nothing changes.

        Raises:
            InvalidArgument, NotFound, FailedPrecondition: as `policy`.
            Aborted: ADAPTER_LEASED.
            PermissionDenied: NOT_OWNER.
        """
        if not name:
            raise InvalidArgument("REQUIRED", "ppo_adapter_name is empty: name a policy", field="ppo_adapter_name")
        entry = self.policy(None, name, "ppo_adapter_name")
        if may_lease():
            self._registry.check_may_change(entry)
            self._sessions.check_free(session, entry.key)
        return entry

    def lease(self, session: Session, name: str) -> None:
        """Makes a policy the session's active adapter, and gives the session its lease if the caller may train.

        Raises:
            OnebaseError: as `check_lease`; then nothing has changed.
        """
        entry = self.check_lease(session, name)
        if may_lease():
            self._sessions.take(session, entry.key)
        self._sessions.activate(session, name)

    def require(self, session: Session | None, entry: Entry) -> None:
        """Sees to it that the session may train an adapter: it is the caller's to change, and its lease is taken.

        Raises:
            PermissionDenied: NOT_OWNER.
            Aborted: NOT_LEASE_HOLDER.
        """
        self._registry.check_may_change(entry)
        self._sessions.require(session, entry.key)

    def reference(self, name: str) -> Named:
        """A frozen reference, or the base for the empty name.

        Raises:
            NotFound: ADAPTER_NOT_FOUND.
            FailedPrecondition: WRONG_ADAPTER_KIND.
        """
        if name in ("", BASE_NAME):
            return Bare()
        entry = self._registry.get(name, "reference", AdapterKind.REFERENCE)
        if entry.kind is not AdapterKind.REFERENCE:
            raise _wrong_kind(name, entry.kind.value, "a frozen reference", "reference")
        return entry

    def rewards(self, names: list[str], field: str) -> list[Entry]:
        """Reward adapters in the order named; without names, the server's only one.

        Args:
            names: as the request names them; one may come several times.
            field: path of each name in the request, with {} for its index.

        Raises:
            InvalidArgument: a bad name; or none where there are several (AMBIGUOUS_REWARD_ADAPTER).
            NotFound: ADAPTER_NOT_FOUND.
            FailedPrecondition: WRONG_ADAPTER_KIND; NO_REWARD_ADAPTER.
        """
        if not names:
            return [self._only_reward(field.split("[")[0])]
        entries = []
        for index, name in enumerate(names):
            at = field.format(index)
            if name == BASE_NAME:
                raise _wrong_kind(BASE_NAME, "the base with no", "a reward", at)
            entry = self._registry.get(name, at, AdapterKind.REWARD)
            if entry.kind is not AdapterKind.REWARD:
                raise _wrong_kind(name, entry.kind.value, "a reward", at)
            entries.append(entry)
        return entries

    def _only_reward(self, field: str) -> Entry:
        entries = self._registry.entries(AdapterKind.REWARD)
        if not entries:
            raise FailedPrecondition(
                "NO_REWARD_ADAPTER",
                "this server has no reward adapter: start it with --reward NAME=PATH, or load one with LoadAdapter",
                field=field,
            )
        if len(entries) > 1:
            raise InvalidArgument(
                "AMBIGUOUS_REWARD_ADAPTER",
                f"{field} is empty, and this server has several reward adapters: name some of "
                + ", ".join(entry.name for entry in entries),
                field=field,
            )
        return entries[0]

    def _named_or_active(self, session: Session | None, name: str, field: str) -> Entry:
        if name:
            return self._registry.get(name, field)
        if session is None:
            raise InvalidArgument(
                "REQUIRED",
                f"{field} is empty and so is session_id: name the adapter, or a session that has one",
                field=field,
            )
        if not session.active:
            raise FailedPrecondition(
                "NO_ACTIVE_ADAPTER",
                f"{field} is empty and the session has no active adapter: name one here, or call SetActiveAdapter",
                field=field,
            )
        return self._registry.get(session.active, field)


def may_lease() -> bool:
    """Whether the caller's sessions take leases: what only reads must not keep a trainer out."""
    return Scope.TRAIN in caller().scopes


def need_value_head(entry: Named, field: str, way_out: str = "create or load the policy with value_head") -> None:
    """Refuses an adapter without a value head; `way_out` is the end of the message.

    Raises:
        FailedPrecondition: NO_VALUE_HEAD.
    """
    if not (isinstance(entry, Entry) and entry.facts.value_head):
        raise FailedPrecondition(
            "NO_VALUE_HEAD",
            f"{field} needs a value head, and {entry.name!r} has none: {way_out}",
            field=field,
        )


def _wrong_kind(name: str, kind: str, wanted: str, field: str) -> FailedPrecondition:
    return FailedPrecondition(
        "WRONG_ADAPTER_KIND",
        f"{field} is {name!r}, which is {_article(kind)} adapter: name {wanted} adapter",
        field=field,
    )


def _article(kind: str) -> str:
    return kind if kind.startswith("the ") else f"a {kind}"
