"""Regular expressions of module names, matched in a time that no pattern can blow up.

Clients choose patterns, and Python's `re` may take ages over one: `(a+)+$`, or `(.|.)` forty times. So the regular part
of its language is matched here by all ways at once (Thompson, "Regular expression search algorithm", CACM 1968), with
what was found kept, and no more than a budget of steps. What matches is what `re.fullmatch` says. Lookaround,
backreferences, flags and possessive repeats are refused.

Knows no model and no adapter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeVar

V = TypeVar("V")

MAX_NAMES = 1024
"""Modules or patterns in one list or map: what PEFT does with them takes the square of their number."""
MAX_LENGTH = 2048
"""Characters of a pattern."""
MAX_STATES = 4000
"""Places in a pattern, with each repeat of {m,n} counted."""
MAX_STEPS = 1_000_000
"""Of one resolution, over all of its patterns and names: about a second."""
_CHECK_STEPS = MAX_STEPS // 4
"""Of reading all patterns of a config for the first time."""
_PER_PATTERN, _PER_CHARACTER = 100, 6
"""Steps for `re` to read a pattern, and for each character that is read once more here."""
_MAX_DEPTH = 20

_REPEATS: Mapping[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_PLAIN = re.compile(r"[A-Za-z0-9_.-]*", re.ASCII)
_COUNT = re.compile(r"\{(\d{0,4})(,?)(\d{0,4})\}", re.ASCII)
_WAY_OUT = "list the modules' names instead"

_Test = Callable[[str], bool]
_Condition = Callable[[str, str], bool]  # of the characters before and behind; "" at the ends


class PatternError(ValueError):
    """A pattern that is not matched here; the message says why, and the way out."""


class Budget:
    """Steps that one resolution may take."""

    def __init__(self, steps: int = MAX_STEPS) -> None:
        self._left = steps

    def spend(self, steps: int) -> None:
        """Takes steps.

        Raises:
            PatternError: there are none left.
        """
        self._left -= steps
        if self._left < 0:
            raise PatternError(f"it takes too long to match: {_WAY_OUT}")


class Pattern:
    """A pattern, read.

    Raises:
        PatternError: it is not one that is matched here.
    """

    def __init__(self, text: str, budget: Budget) -> None:
        self._budget = budget
        self._plain: re.Pattern[str] | None = None
        body = text.removeprefix(BELOW)
        if body != text and _PLAIN.fullmatch(body):  # one repeat and no choice: quadratic at worst
            _check_length(text)
            budget.spend(_PER_PATTERN + len(text))
            self._plain = re.compile(text)
            return
        self._nfa, self._start, self._end = _read(text, budget)
        self._known: dict[tuple[frozenset[int], str, str], frozenset[int]] = {}

    def fullmatch(self, name: str) -> bool:
        """Whether the whole of a name matches.

        Raises:
            PatternError: the budget is spent.
        """
        if self._plain is not None:
            self._budget.spend(1)
            return self._plain.fullmatch(name) is not None
        here, before = frozenset((self._start,)), ""
        for character in name:
            here = self._step(here, before, character)
            if not here:
                return False
            before = character
        return self._end in self._reached(here, before, "")

    def _step(self, here: frozenset[int], before: str, character: str) -> frozenset[int]:
        key = (here, before, character)
        known = self._known.get(key)
        self._budget.spend(1)
        if known is None:
            reached = self._reached(here, before, character)
            self._budget.spend(len(reached))
            moves = (self._nfa.moves[state] for state in reached)
            known = self._known[key] = frozenset(move.to for move in moves if move and move.test(character))
        return known

    def _reached(self, here: frozenset[int], before: str, behind: str) -> set[int]:
        """The states that are reached without another character."""
        found, todo = set(here), list(here)
        while todo:
            for condition, to in self._nfa.jumps[todo.pop()]:
                self._budget.spend(1)
                if to not in found and (condition is None or condition(before, behind)):
                    found.add(to)
                    todo.append(to)
        return found


BELOW = r"(?:.*\.)?"
"""In front of a pattern: what PEFT puts in front of the keys of rank_pattern and alpha_pattern."""


def checking() -> Budget:
    """Steps for reading all patterns of a config or request for the first time."""
    return Budget(_CHECK_STEPS)


def check(text: str, budget: Budget | None = None) -> None:
    """Sees to it that a pattern is one that is matched here.

    Raises:
        PatternError: it is not, or the budget is spent.
    """
    budget = budget or checking()
    budget.spend(1)
    if not _PLAIN.fullmatch(text) or len(text) > MAX_LENGTH:
        _read(text, budget)


def _check_length(text: str) -> None:
    if len(text) > MAX_LENGTH + len(BELOW):
        raise PatternError(f"it has {len(text)} characters, and {MAX_LENGTH} are the most: {_WAY_OUT}")


def _read(text: str, budget: Budget) -> tuple[_Nfa, int, int]:
    """A pattern's states, the first of them, and the last."""
    _check_length(text)
    budget.spend(_PER_PATTERN + _PER_CHARACTER * len(text))
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(f"it is no regular expression ({error})") from None
    nfa = _Nfa()
    start, end = nfa.build(_Parser(text).parse())
    budget.spend(2 * len(nfa.jumps))
    return nfa, start, end


def matching(text: str, names: Iterable[str], budget: Budget | None = None) -> list[str]:
    """The names that a pattern matches, as `re.fullmatch` would.

    Raises:
        PatternError: it is not matched here.
    """
    pattern = Pattern(text, budget or Budget())
    return [name for name in names if pattern.fullmatch(name)]


def assigned(values: Mapping[str, V], names: Iterable[str], budget: Budget | None = None) -> dict[str, V]:
    """What each name has by PEFT's rule (`get_pattern_key`): the first key that matches it, or its end after a dot.

    Raises:
        PatternError: a key is not matched here.
    """
    budget = budget or Budget()
    patterns = [
        (Pattern(f"{BELOW}{key}" if _PLAIN.fullmatch(key) else f"{BELOW}(?:{key})", budget), value)
        for key, value in values.items()
    ]
    found: dict[str, V] = {}
    for name in names if patterns else ():
        for pattern, value in patterns:
            if pattern.fullmatch(name):
                found[name] = value
                break
    return found


# ------------------------------------------------------------------------------------------------------ reading


class _Char(NamedTuple):
    test: _Test


class _Assertion(NamedTuple):
    condition: _Condition


class _Chain(NamedTuple):
    parts: list[_Node]


class _Choice(NamedTuple):
    ways: list[_Node]


class _Repeat(NamedTuple):
    part: _Node
    least: int
    most: int | None


_Node = _Char | _Assertion | _Chain | _Choice | _Repeat


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _not(test: _Test) -> _Test:
    return lambda character: not test(character)


_CLASSES: dict[str, _Test] = {"d": str.isdecimal, "w": _is_word, "s": str.isspace}
_CLASSES |= {letter.upper(): _not(test) for letter, test in _CLASSES.items()}
_ASSERTIONS: dict[str, _Condition] = {
    "^": lambda before, _: not before,
    "$": lambda _, behind: not behind,
    "b": lambda before, behind: bool(before and _is_word(before)) != bool(behind and _is_word(behind)),
}
_ASSERTIONS |= {"A": _ASSERTIONS["^"], "Z": _ASSERTIONS["$"]}


class _Parser:
    """Reads what `re` has found to be a regular expression; refuses what is not regular in it."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0

    def parse(self) -> _Node:
        node = self._choice()
        if self._at < len(self._text):
            raise self._strange()
        return node

    def _choice(self) -> _Node:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise PatternError(f"its groups are nested more than {_MAX_DEPTH} deep: {_WAY_OUT}")
        ways = [self._chain()]
        while self._take("|"):
            ways.append(self._chain())
        self._depth -= 1
        return ways[0] if len(ways) == 1 else _Choice(ways)

    def _chain(self) -> _Node:
        parts: list[_Node] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            parts.append(self._repeated(self._atom()))
        return _Chain(parts)

    def _repeated(self, part: _Node) -> _Node:
        least: int
        most: int | None
        sign = self._text[self._at : self._at + 1]
        if sign in _REPEATS:
            self._at += 1
            least, most = _REPEATS[sign]
        else:
            count = _COUNT.match(self._text, self._at)
            if count is None:
                return part
            self._at = count.end()
            least = int(count[1] or 0)
            most = (int(count[3]) if count[3] else None) if count[2] else least
        if isinstance(part, _Assertion):
            raise self._strange()
        self._take("?")  # the first match or the last: whether there is one is the same
        if self._at < len(self._text) and self._text[self._at] in "*+?":
            raise self._strange()
        return _Repeat(part, least, most)

    def _atom(self) -> _Node:
        sign = self._next()
        if sign == "(":
            if self._take("?") and not self._take(":"):
                raise self._strange()
            inner = self._choice()
            if not self._take(")"):
                raise self._strange()
            return inner
        if sign == "[":
            return _Char(self._set())
        if sign == ".":
            return _Char(lambda character: character != "\n")
        if sign in "^$":
            return _Assertion(_ASSERTIONS[sign])
        if sign == "\\":
            letter = self._next()
            if letter in _ASSERTIONS:
                return _Assertion(_ASSERTIONS[letter])
            return _Char(self._escaped(letter))
        if sign in "{}*+?":
            raise self._strange()
        return _Char(sign.__eq__)

    def _escaped(self, letter: str) -> _Test:
        if letter in _CLASSES:
            return _CLASSES[letter]
        if letter.isalnum():
            raise self._strange()
        return letter.__eq__

    def _set(self) -> _Test:
        negated, tests = self._take("^"), list[_Test]()
        while not (tests and self._take("]")):
            low = self._next()
            if low == "\\":
                low = self._next()
                tests.append(self._escaped(low))
            else:
                tests.append(low.__eq__)
            if self._text[self._at : self._at + 1] == "-" and self._text[self._at + 1 : self._at + 2] != "]":
                self._at += 1
                high = self._next()
                if high == "\\":
                    high = self._next()
                    self._escaped(high)
                tests[-1] = lambda character, low=low, high=high: low <= character <= high  # type: ignore[misc]
        any_of: _Test = lambda character: any(test(character) for test in tests)  # noqa: E731
        return _not(any_of) if negated else any_of

    def _next(self) -> str:
        if self._at >= len(self._text):
            raise self._strange()
        self._at += 1
        return self._text[self._at - 1]

    def _take(self, sign: str) -> bool:
        if self._text.startswith(sign, self._at):
            self._at += 1
            return True
        return False

    def _strange(self) -> PatternError:
        return PatternError(
            f"{self._text[max(0, self._at - 3) : self._at + 5]!r} in it is not taken here: use names, '.', classes, "
            f"groups, '|' and repeats, or {_WAY_OUT}"
        )


class _Move(NamedTuple):
    test: _Test
    to: int


class _Nfa:
    """States with at most one move by a character, and any number of jumps without one."""

    def __init__(self) -> None:
        self.moves: list[_Move | None] = []
        self.jumps: list[list[tuple[_Condition | None, int]]] = []

    def build(self, node: _Node) -> tuple[int, int]:
        """A node's first and last state."""
        if isinstance(node, _Chain):
            return self._joined(self.build(part) for part in node.parts)
        start, end = self._state(), self._state()
        if isinstance(node, _Char):
            self.moves[start] = _Move(node.test, end)
        elif isinstance(node, _Assertion):
            self.jumps[start].append((node.condition, end))
        elif isinstance(node, _Choice):
            for way in node.ways:
                self._between(start, self.build(way), end)
        else:
            self._repeat(node, start, end)
        return start, end

    def _repeat(self, node: _Repeat, start: int, end: int) -> None:
        first, last = self._joined(self.build(node.part) for _ in range(node.least))
        self._jump(start, first)
        if node.most is None:
            again = self.build(node.part)
            self._between(last, again, end)
            self._jump(again[1], again[0])
        else:
            for _ in range(node.most - node.least):
                self._jump(last, end)
                more = self.build(node.part)
                self._jump(last, more[0])
                last = more[1]
        self._jump(last, end)

    def _joined(self, parts: Iterable[tuple[int, int]]) -> tuple[int, int]:
        first = last = self._state()
        for start, end in parts:
            self._jump(last, start)
            last = end
        return first, last

    def _between(self, start: int, part: tuple[int, int], end: int) -> None:
        self._jump(start, part[0])
        self._jump(part[1], end)

    def _jump(self, start: int, end: int) -> None:
        self.jumps[start].append((None, end))

    def _state(self) -> int:
        if len(self.jumps) >= MAX_STATES:
            raise PatternError(f"it repeats too much: {_WAY_OUT}")
        self.moves.append(None)
        self.jumps.append([])
        return len(self.jumps) - 1
