"""Passes and steps on one adapter, made again where a server that was restarted has lost them.

Pending gradients live in the server's memory alone. Each call says how many passes it builds upon; a server that has
others refuses, and then those passes are made again from what is kept here until their optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from onebase.client import types as t
from onebase.client.errors import FailedPreconditionError

if TYPE_CHECKING:
    from onebase.client import Session

GRADIENTS_LOST = "GRADIENTS_LOST"
"""The reason that a server gives when it does not have the gradients any more that a call builds upon."""

Result = TypeVar("Result")
Pass = Callable[[int], t.ForwardBackward]
"""Makes a forward and backward pass, behind so many others that are pending."""


class Gradients:
    """The training calls of one adapter.

    Args:
        session: holds the adapter's lease.
        adapter: its name; "" is the session's active adapter.
    """

    def __init__(self, session: Session, adapter: str) -> None:
        self._session = session
        self._adapter = adapter
        self._pending: list[Pass] = []

    def add(
        self,
        minibatch: Sequence[t.TrainingSequence],
        loss: t.Loss,
        *,
        denominator: float | None = None,
        expected_version: int | None = None,
    ) -> t.ForwardBackward:
        """A forward and backward pass. See `Session.forward_backward`."""

        def made(pending: int) -> t.ForwardBackward:
            return self._session.forward_backward(
                minibatch,
                loss,
                adapter=self._adapter,
                denominator=denominator,
                expected_version=expected_version,
                expected_pending=pending,
            )

        result = self._behind(len(self._pending), made)
        self._pending.append(made)
        return result

    def step(
        self, learning_rate: float, max_grad_norm: float | None = None, *, expected_version: int | None = None
    ) -> t.OptimStep:
        """An AdamW step with the passes since the last one. See `Session.optim_step`."""

        def made(pending: int) -> t.OptimStep:
            return self._session.optim_step(
                t.AdamW(learning_rate=learning_rate),
                max_grad_norm=max_grad_norm or 0.0,
                adapter=self._adapter,
                expected_version=expected_version,
                expected_pending=pending,
            )

        result = self._behind(len(self._pending), made)
        self._pending.clear()
        return result

    def _behind(self, count: int, made: Callable[[int], Result]) -> Result:
        """Makes a call behind the first `count` passes; makes those again where the server has lost them."""
        while True:
            try:
                return made(count)
            except FailedPreconditionError as error:
                if error.reason != GRADIENTS_LOST or not count:
                    raise
            for index, earlier in enumerate(self._pending[:count]):
                self._behind(index, earlier)
