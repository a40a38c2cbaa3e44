"""Parts of several jobs go through one step together; whatever goes wrong ends the guilty job alone.

    a part fails          each job's parts are run by themselves, and the guilty job ends
    memory runs out       half of the parts at a time, down to a single part
    … for a single part   a smaller piece of it: fewer tokens of a prompt, fewer rows of a micro-batch
    … for the smallest    a completion gives its slot up and goes on later; anything else ends its job

To run a part twice changes nothing: its numbers are kept only after all of its step succeeded, and a row's numbers do
not depend on the rows beside it (on an exact engine, to the bit). Of what is cut, only a micro-batch's gradients do,
which are then sums in another order.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from onebase.server.completions import Completion, GenerateTask, Prefill
from onebase.server.engine import Engine
from onebase.server.errors import Internal, OnebaseError
from onebase.server.memory import is_out_of_memory, is_poison, out_of_memory
from onebase.server.tasks import PassTask, ScoreTask, StepTask

log = logging.getLogger(__name__)

AnyTask = ScoreTask | GenerateTask | PassTask | StepTask
Part = TypeVar("Part")

_WAYS_OUT = {
    GenerateTask: "ask for a shorter prompt or a smaller max_new_tokens, or serve with a smaller --max-context",
    ScoreTask: "send a shorter sequence, or do not ask for its logits",
    PassTask: "send shorter sequences, or serve with --gradient-checkpointing",
    StepTask: "use a smaller rank, or delete an adapter",
}


class EngineLost(BaseException):
    """The engine cannot be trusted any more. No Exception: only the end of the worker's loop may catch it."""


@dataclass(frozen=True)
class _Shortage:
    """Memory ran out: what the error said, without the tensors that it held."""

    text: str


@dataclass(frozen=True)
class _Trouble:
    """Another error; `told` makes a ticket of it only where it ends a job."""

    error: Exception


class Isolation:
    """Runs parts of tasks.

    Args:
        engine: the device.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.too_many = 0  # tokens for which together memory was too short, though it was not for any one by itself
        self._tight = self._blamed = False

    def run(self, parts: Sequence[tuple[AnyTask, Part]], act: Callable[[Sequence[Part]], None]) -> None:
        """Runs parts together, and in smaller pieces where that fails; tasks whose parts cannot be run end."""
        self._tight = self._blamed = False
        tokens = sum(_tokens(part) for _, part in parts)
        self._run(parts, act)
        self.too_many = tokens if self._tight and not self._blamed else 0

    def attempt(self, task: AnyTask, act: Callable[..., object], *arguments: object) -> None:
        """Runs something for one task; what it raises ends the task."""
        failure = _failure(act, *arguments)
        if failure is not None:
            self._end(task, failure, f"a part of {_name(task)}")

    def _run(
        self,
        parts: Sequence[tuple[AnyTask, Part]],
        act: Callable[[Sequence[Part]], None],
        *,
        relieved: bool = False,
    ) -> None:
        parts = [(task, part) for task, part in parts if not task.ended]
        if not parts:
            return
        failure = _failure(act, [part for _, part in parts])
        if failure is None:
            return
        owners = list(dict.fromkeys(task for task, _ in parts))
        if isinstance(failure, _Shortage):
            self._in_smaller_pieces(parts, act, failure, relieved=relieved)
        elif len(owners) > 1:
            log.warning("a step of %d requests failed (%s): running each by itself", len(owners), failure.error)
            del failure
            for owner in owners:
                self._run([one for one in parts if one[0] is owner], act)
        else:
            self._end(owners[0], failure, "")

    def _in_smaller_pieces(
        self,
        parts: Sequence[tuple[AnyTask, Part]],
        act: Callable[[Sequence[Part]], None],
        shortage: _Shortage,
        *,
        relieved: bool,
    ) -> None:
        self._engine.relieve()
        if len(parts) > 1:
            log.info("memory ran out in a step of %d parts: running half of them at a time", len(parts))
            self._tight = True
            middle = len(parts) // 2
            self._run(parts[:middle], act, relieved=True)
            self._run(parts[middle:], act, relieved=True)
            return
        task, part = parts[0]
        if not relieved:
            self._run(parts, act, relieved=True)
        elif _cut(part):
            self._tight = self._tight or isinstance(part, Prefill)  # where a pass is cut is its own matter
            self._run(parts, act, relieved=True)
        elif not self._put_off(part):
            self._end(task, shortage, _what(part))

    def _put_off(self, part: object) -> bool:
        """Lets completions begin or go on later, when others have given their memory back; False if they had it all."""
        kv = self._engine.kv
        if isinstance(part, Completion):
            own, first = 1, part
        elif isinstance(part, Prefill):
            own, first = len(part.completions), part.completions[0]
        else:
            return False
        if kv.used <= own:
            if first.starved == first.length:
                return False
            first.starved = first.length
        if isinstance(part, Prefill):
            first.task.withdraw(self._engine, part)
        elif isinstance(part, Completion):
            first.task.preempt(self._engine, part)
        kv.allowed = max(1, kv.used)
        self._engine.relieve()
        self._blamed = True  # the cache was short, not the step too large
        return True

    def _end(self, task: AnyTask, failure: _Shortage | _Trouble, what: str) -> None:
        if isinstance(failure, _Trouble):
            task.fail(self._engine, told(failure.error))
            return
        self._blamed = True
        self._engine.relieve()
        error = out_of_memory(what, failure.text, _WAYS_OUT[type(task)], retry=self._engine.kv.used > 0)
        log.warning("%s failed: %s", _name(task), error)
        task.fail(self._engine, error)


def told(error: BaseException) -> OnebaseError:
    """What a client is told of an error: a bug becomes an id under which the log has the story.

    Raises:
        EngineLost: after such an error nothing is right any more.
    """
    if isinstance(error, OnebaseError):
        return error
    if is_out_of_memory(error):
        log.warning("memory ran out: %s", error)
        return out_of_memory("this", str(error), "ask for less, delete an adapter, or try again later", retry=True)
    if is_poison(error) or isinstance(error, EngineLost):
        raise EngineLost(str(error)) from error
    ticket = uuid.uuid4().hex[:12]
    log.error("internal error %s", ticket, exc_info=error)
    return Internal("INTERNAL", f"an internal error, logged as {ticket}")


def _failure(act: Callable[..., object], *arguments: object) -> _Shortage | _Trouble | None:
    """What an act raised. Once this has returned, an error of memory and all that it held are gone."""
    try:
        act(*arguments)
    except Exception as error:
        if is_out_of_memory(error):
            return _Shortage(str(error))
        if is_poison(error):
            raise EngineLost(str(error)) from error
        return _Trouble(error)
    return None


def _cut(part: object) -> bool:
    """Makes a part smaller, if that can be done; what is left of it comes in a later step."""
    if isinstance(part, Prefill) and part.stop - part.done > 1:
        part.stop = part.done + (part.stop - part.done) // 2
        return True
    return isinstance(part, PassTask) and part.halve()


def _tokens(part: Any) -> int:
    """Tokens of a part that go through the base in its next step."""
    if isinstance(part, Completion):
        return 1
    if isinstance(part, Prefill):
        return part.stop - part.done
    if isinstance(part, PassTask | StepTask):
        return part.next_cost()
    task, index = part
    return len(task.job.rows[index].tokens)


def _what(part: Any) -> str:
    """What found no room, in words."""
    if isinstance(part, Completion):
        return f"a completion of {part.length} tokens, prompt included"
    if isinstance(part, Prefill):
        return f"a prompt of {len(part.tokens)} tokens"
    if isinstance(part, PassTask):
        return f"a training pass over sequences of {part.next_cost()} tokens"
    if isinstance(part, StepTask):
        return "an optimizer step's moments and copies; its gradients still wait"
    task, index = part
    return f"a sequence of {len(task.job.rows[index].tokens)} tokens to score"


def _name(task: AnyTask) -> str:
    return {GenerateTask: "Generate", ScoreTask: "a score", PassTask: "ForwardBackward"}.get(type(task), "OptimStep")
