"""What the RPC edge needs of the rest of the server: a worker and a tokenizer, by shape alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from onebase.server.jobs import BaseFacts, Job, Message, Tokens, WorkerStatus


class Takes(Protocol):
    """Takes in jobs."""

    def submit(self, job: Job[Any]) -> None:
        """Queues a job.

        Raises:
            OnebaseError: there is no room, or the server drains.
        """
        ...


class WorkerLike(Protocol):
    """The owner of the device: takes jobs from any thread and resolves their `done` on its own."""

    @property
    def facts(self) -> BaseFacts:
        """What is known of the base."""
        ...

    def submit(self, job: Job[Any]) -> None:
        """Queues a job. There is always room for work of the kind ADMIN.

        Raises:
            ResourceExhausted: the queue, or the session's share of it, is full (with retry_after).
            Unavailable: the server drains (DRAINING).
        """
        ...

    def check(self, session: str) -> None:
        """Refuses at once whom `submit` would refuse for want of room, before his request is read.

        Raises:
            ResourceExhausted: as `submit` does.
        """
        ...

    def refused(self, tenant: str, session: str) -> None:
        """Notes that a request was refused for want of room: whose it was pays for that with turns."""
        ...

    def status(self) -> WorkerStatus:
        """What the worker is doing now; returns at once."""
        ...

    def stuck_seconds(self) -> float:
        """How long the engine's step under way has gone on; 0 while there is nothing to do. Returns at once."""
        ...

    def lost(self) -> str:
        """The ticket under which the log says why the engine cannot be trusted any more; "" while it can."""
        ...

    def abandon(self, why: str) -> str:
        """Answers all work UNAVAILABLE, and lets nothing count that the engine still does. Returns the ticket."""
        ...

    def start(self) -> None:
        """Begins to work."""
        ...

    def drain(self, seconds: float) -> None:
        """Refuses new jobs, except to save adapters, and lets those in flight finish for up to so long."""
        ...

    def cut_off(self) -> None:
        """Ends with Unavailable what is under way, and takes only adapters to save; returns when that is so."""
        ...

    def stop(self, drain_seconds: float) -> None:
        """Refuses new jobs, lets those in flight finish for up to `drain_seconds`, cancels the rest, and returns."""
        ...


class TextLike(Protocol):
    """The base's tokenizer. Safe from one thread at a time only."""

    def encode_prompt(self, text: str) -> Tokens:
        """Token ids with the tokenizer's own special tokens in front."""
        ...

    def encode_completion(self, text: str) -> Tokens:
        """Token ids without special tokens."""
        ...

    def encode_joined(self, prompt: str, completion: str) -> Tokens:
        """Token ids of the two texts as one string, with special tokens: what reward models read."""
        ...

    def encode_chat(self, messages: Sequence[Message], *, generation_prompt: bool) -> Tokens:
        """Token ids of a conversation as the chat template renders it.

        Args:
            messages: at least one.
            generation_prompt: whether what begins the next answer stands behind them.

        Raises:
            ValueError: the template refuses these messages; the message says why.
        """
        ...

    def encode_reply(self, prompt: Sequence[Message], completion: Sequence[Message]) -> Tokens | None:
        """Token ids of what the chat template adds to a prompt, as `encode_chat` renders it, for a completion.

        Returns:
            None if the template renders the prompt in another way once the completion stands behind it.

        Raises:
            ValueError: the template refuses these messages; the message says why.
        """
        ...
