"""What steps learn from memory that ran out: the next ones are smaller for a while, so that not each fails first.

Multiplicative decrease and additive increase (Chiu and Jain 1989), of the tokens of a step and of the completions that
run at once. No tensor in here, and no clock.
"""

from __future__ import annotations

from typing import Protocol

LEAST_TOKENS = 16


class Tokens(Protocol):
    """Whoever plans steps."""

    step_tokens: int
    train_tokens: int


class Slots(Protocol):
    """Whoever gives completions their places."""

    allowed: int


class Throttle:
    """A limit that halves when it proved too high, and grows back slowly while it does not.

    Args:
        most: where it begins, and ends.
        least: it never falls below.
        steps: from nothing back to `most`.
    """

    def __init__(self, most: int, least: int = 1, steps: int = 256) -> None:
        self._most = most
        self._least = min(least, most)
        self._growth = most / steps
        self._now = float(most)

    @property
    def now(self) -> int:
        """The limit."""
        return int(self._now)

    def shrink(self, reached: int) -> None:
        """So much proved too much."""
        self.hold(min(self.now, reached) // 2)

    def hold(self, reached: int) -> None:
        """More than so much proved too much."""
        self._now = float(max(self._least, min(self.now, reached)))

    def grow(self) -> None:
        """There was room for what was asked."""
        self._now = min(float(self._most), self._now + self._growth)


class Pressure:
    """Keeps the limits of steps.

    Args:
        tokens: whose limits of tokens it keeps.
        slots: whose limit of completions it keeps; others may lower that between two calls.
    """

    def __init__(self, tokens: Tokens, slots: Slots) -> None:
        self._tokens = tokens
        self._slots = slots
        self._infer = Throttle(tokens.step_tokens, LEAST_TOKENS)
        self._train = Throttle(tokens.train_tokens, LEAST_TOKENS)
        self._running = Throttle(slots.allowed)

    def learn(self, *, training: bool, too_many: int) -> None:
        """Takes in how a step went.

        Args:
            training: whether it trained.
            too_many: tokens for which together memory was too short; 0 if it was not.
        """
        throttle = self._train if training else self._infer
        if too_many:
            throttle.shrink(too_many)
        else:
            throttle.grow()
        if self._slots.allowed < self._running.now:
            self._running.hold(self._slots.allowed)
        elif not (training or too_many):
            self._running.grow()
        self._tokens.step_tokens, self._tokens.train_tokens = self._infer.now, self._train.now
        self._slots.allowed = self._running.now
