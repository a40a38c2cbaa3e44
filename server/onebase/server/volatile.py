"""What services tell of that may have to outlive the process; and the keeper of a server without a state directory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from onebase.server.errors import FailedPrecondition
from onebase.server.jobs import OptimStepResult
from onebase.server.leases import Session
from onebase.server.registry import Entry
from onebase.server.store import ResponseRow


class Volatile:
    """Nothing outlives the process."""

    def step_path(self, entry: Entry) -> Path | None:
        """Where an optimizer step shall write the version that it makes; None: nowhere."""
        del entry
        return None

    async def before_step(self, entry: Entry) -> None:
        """Is awaited before each optimizer step."""

    def stepping(self, entry: Entry) -> contextlib.AbstractContextManager[None]:
        """A step is under way inside the block, until it is as durable as it will be."""
        del entry
        return contextlib.nullcontext()

    async def seen(self, versions: Mapping[int, int]) -> None:
        """Returns when these versions (uid → version) may be shown: a step that can still be lost is seen by nobody.

        Raises:
            OnebaseError: one of them is not durable, and why.
        """

    async def shown(self, entries: Sequence[Entry]) -> list[Entry]:
        """The same for who only asks how adapters are: at the versions that may be shown."""
        return list(entries)

    async def stepped(self, entry: Entry, result: OptimStepResult, record: ResponseRow | None) -> None:
        """Takes a step in; returns when it is as durable as the settings promise.

        Raises:
            OnebaseError: the step was made, and is not durable: see `finish_step`.
        """

    async def finish_step(self, uid: int, version: int) -> None:
        """Makes a step durable that `stepped` could not.

        Raises:
            OnebaseError: it still cannot.
        """

    async def add(
        self, entry: Entry, record: ResponseRow | None, lessee: Callable[[], Session | None] = lambda: None
    ) -> None:
        """Makes a new adapter durable, in the place of any other of its name, with its lease and the call's answer.

        Args:
            entry: the adapter.
            record: what the call that makes it is answered.
            lessee: the session that gets its lease; called on another thread, at the moment of the commit.

        Raises:
            OnebaseError: it is not.
        """

    async def remove(self, key: str, least_version: int, record: ResponseRow | None) -> None:
        """Makes it durable that there is no adapter of this key, and which version the next one begins at.

        Raises:
            OnebaseError: it is not.
        """

    async def answered(self, record: ResponseRow | None) -> None:
        """Makes an answer durable whose effect is durable elsewhere.

        Raises:
            OnebaseError: it is not.
        """

    async def checkpoint(
        self, entry: Entry, client_state: bytes | None, record: Callable[[int], ResponseRow | None]
    ) -> int:
        """Makes the newest version durable now; returns which one that is.

        Args:
            entry: the adapter.
            client_state: replaces what is kept with it; None keeps that.
            record: what the call will be answered, by that version.

        Raises:
            FailedPrecondition: NOT_DURABLE: nothing outlives this server.
            OnebaseError: it is not durable.
        """
        del client_state, record
        raise FailedPrecondition(
            "NOT_DURABLE",
            f"adapter {entry.name!r} cannot be made durable, since nothing outlives this server: start it with "
            "--state DIR, or save the adapter with SaveAdapter",
        )

    def durable_version(self, uid: int) -> int | None:
        """The newest version of an adapter that would be there after a crash; None where none would."""
        del uid
        return None

    def lease_ended(self, key: str) -> None:
        """Nobody trains this adapter any more."""

    def abandoned(self, key: str) -> None:
        """Whoever trains this adapter is gone for now: saves it, and frees its device memory then."""

    def session_changed(self, session: Session) -> None:
        """Notes a session as it is now; `synced` waits for it."""

    def session_ended(self, session: Session) -> None:
        """Forgets a session."""

    async def synced(self, session_id: str) -> None:
        """Returns when the sessions are noted as they were when it was called.

        Raises:
            OnebaseError: this one is not. One that is not noted because of another's trouble keeps nobody else.
        """
        del session_id

    def tick(self) -> None:
        """Is called about once a second."""

    async def close(self) -> None:
        """Saves what has changed. Steps and other changes must have ended."""
