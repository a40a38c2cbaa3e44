"""Requests under way on the worker's thread: what each has got, what it wants next, how it ends.

A task binds the adapter versions that it reads when it begins and gives them back when it ends, however it ends. It
resolves its job's future exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from onebase.server.errors import FailedPrecondition, OnebaseError
from onebase.server.jobs import (
    CompletionChunk,
    DropGradientsJob,
    FinishReason,
    ForwardBackwardJob,
    GenerateJob,
    Job,
    OptimStepJob,
    RowResult,
    ScoreJob,
    ScoreResult,
    Work,
)

if TYPE_CHECKING:
    from onebase.server.engine.adapters import Weights
    from onebase.server.engine.engine import Drawn, Engine
    from onebase.server.engine.text import Detokenizer
    from onebase.server.engine.training import Pass

J = TypeVar("J", bound=Job[Any])


class Task(Generic[J]):
    """A job under way."""

    def __init__(self, job: J) -> None:
        self.job = job
        self.begun = False
        self.ended = False

    @property
    def session(self) -> str:
        """Whose turn it takes."""
        return self.job.session

    @property
    def work(self) -> Work:
        """Its kind of work."""
        return self.job.work

    def begin(self, engine: Engine) -> None:
        """Binds what it reads of the engine, just before its first step."""
        del engine
        self.begun = True

    def release(self, engine: Engine) -> None:
        """Gives back to the engine what it bound."""

    def succeed(self, engine: Engine, result: object) -> None:
        """Ends with a result."""
        self._end(engine)
        if self.job.done.set_running_or_notify_cancel():
            self.job.done.set_result(result)

    def fail(self, engine: Engine, error: OnebaseError) -> None:
        """Ends with an error."""
        if not self.ended:
            self._end(engine)
            if self.job.done.set_running_or_notify_cancel():
                self.job.done.set_exception(error)

    def _end(self, engine: Engine) -> None:
        self.ended = True
        self.release(engine)


class ScoreTask(Task[ScoreJob]):
    """Rows to score; a long job takes several steps and reads one version throughout."""

    def __init__(self, job: ScoreJob) -> None:
        super().__init__(job)
        self.weights: dict[int, Weights | None] = {}
        self.results: list[RowResult | None] = [None] * len(job.rows)
        self._planned = 0
        self._missing = len(job.rows)

    def begin(self, engine: Engine) -> None:
        """Binds every adapter that the rows name."""
        super().begin(engine)
        for uid in {row.adapter for row in self.job.rows}:
            self.weights[uid] = engine.bind(uid, self.job.versions.get(uid))

    def release(self, engine: Engine) -> None:
        """Gives the versions back."""
        for weights in self.weights.values():
            engine.release(weights)

    def next_cost(self) -> int:
        """Tokens of the next row; 0 when all are planned."""
        return len(self.job.rows[self._planned].tokens) if self._planned < len(self.job.rows) else 0

    def take(self) -> int:
        """Plans the next row."""
        self._planned += 1
        return self._planned - 1

    def accept(self, engine: Engine, index: int, result: RowResult) -> None:
        """Keeps a row's numbers; the last one ends the task."""
        self.results[index] = result
        self._missing -= 1
        if not self._missing:
            versions = {uid: 0 if weights is None else weights.version for uid, weights in self.weights.items()}
            self.succeed(engine, ScoreResult(tuple(r for r in self.results if r is not None), versions))


@dataclass(eq=False)
class Completion:
    """One completion under way."""

    task: GenerateTask
    prompt_index: int
    completion_index: int
    detokenizer: Detokenizer | None
    slot: int = -1
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    text: str = ""
    sent_tokens: int = 0
    sent_text: int = 0

    @property
    def place(self) -> tuple[int, int, int]:
        """Where its next token belongs: (prompt, completion, position)."""
        return self.prompt_index, self.completion_index, len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.task.job.prompts[self.prompt_index]) + len(self.tokens)

    def banned(self, eos: Sequence[int]) -> tuple[int, ...]:
        """Tokens that may not come yet."""
        sampling = self.task.job.sampling
        return (*eos, *sampling.stop_token_ids) if len(self.tokens) < sampling.min_new_tokens else ()

    def add(self, drawn: Drawn, eos: Sequence[int], engine: Engine) -> FinishReason | None:
        """Takes its next token; the reason if that ends it.

        Raises:
            FailedPrecondition: the logits were not finite.
        """
        if not math.isfinite(drawn.logprob):
            raise FailedPrecondition("NONFINITE_LOGITS", "the policy's logits are not finite: load an earlier version")
        sampling = self.task.job.sampling
        self.tokens.append(drawn.token)
        self.logprobs.append(drawn.logprob)
        self.values.append(drawn.value)
        reason = None
        if drawn.token in sampling.stop_token_ids:
            reason = FinishReason.STOP_TOKEN
        elif drawn.token in eos and not sampling.ignore_eos:
            reason = FinishReason.EOS
        elif len(self.tokens) >= sampling.max_new_tokens:
            reason = FinishReason.LENGTH
        if self.detokenizer is not None:
            self.text += self.detokenizer.add(drawn.token, last=reason is not None)
            stops = [at for stop in sampling.stop if (at := self.text.find(stop, max(0, self.sent_text))) >= 0]
            if stops:
                self.text, reason = self.text[: min(stops)], FinishReason.STOP_STRING
        elif reason is not None:
            self.text = engine.text.decode(self.tokens)
        return reason

    def chunk(self, reason: FinishReason | None) -> CompletionChunk:
        """What was not sent yet."""
        job = self.task.job
        stop = len(self.text) if reason else len(self.text) - held_back(self.text, job.sampling.stop)
        tokens, text = slice(self.sent_tokens, len(self.tokens)), self.text[self.sent_text : stop]
        self.sent_tokens, self.sent_text = len(self.tokens), max(stop, self.sent_text)
        return CompletionChunk(
            prompt_index=self.prompt_index,
            completion_index=self.completion_index,
            tokens=tuple(self.tokens[tokens]),
            logprobs=tuple(self.logprobs[tokens]) if job.return_logprobs else (),
            values=tuple(self.values[tokens]) if job.return_values else (),
            text=text,
            version=0 if self.task.weights is None else self.task.weights.version,
            finish_reason=reason,
        )


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    longest = min(len(text), max((len(stop) for stop in stops), default=1) - 1)
    for count in range(longest, 0, -1):
        if any(stop.startswith(text[-count:]) for stop in stops):
            return count
    return 0


class GenerateTask(Task[GenerateJob]):
    """Prompts to complete. All completions are made by the version that was newest when the task began."""

    def __init__(self, job: GenerateJob) -> None:
        super().__init__(job)
        self.weights: Weights | None = None
        self._waiting = [(p, c) for p in range(len(job.prompts)) for c in range(job.n)]
        self._waiting.reverse()
        self.running: list[Completion] = []

    def begin(self, engine: Engine) -> None:
        """Binds the policy."""
        super().begin(engine)
        self.weights = engine.bind(self.job.adapter, self.job.version)

    def release(self, engine: Engine) -> None:
        """Gives the version and the places in the cache back."""
        engine.release(self.weights)
        for completion in self.running:
            engine.kv.give_back(completion.slot)
        self.running.clear()

    def next_cost(self) -> int:
        """Tokens of the next prompt; 0 when all completions have begun."""
        return len(self.job.prompts[self._waiting[-1][0]]) if self._waiting else 0

    def take(self, engine: Engine) -> list[Completion]:
        """Begins completions of the next prompt, as many as there are places for."""
        prompt = self._waiting[-1][0]
        streaming = self.job.stream_tokens or bool(self.job.sampling.stop)
        begun: list[Completion] = []
        while self._waiting and self._waiting[-1][0] == prompt and engine.kv.free:
            index = self._waiting.pop()[1]
            completion = Completion(self, prompt, index, engine.detokenizer() if streaming else None)
            completion.slot = engine.kv.take()
            begun.append(completion)
        self.running += begun
        return begun

    def accept(self, engine: Engine, completion: Completion, drawn: Drawn) -> None:
        """Gives a completion its next token; sends what is new; the last completion ends the task."""
        reason = completion.add(drawn, engine.facts.eos_token_ids, engine)
        if reason is not None:
            self.running.remove(completion)
            engine.kv.give_back(completion.slot)
        if reason is not None or self.job.stream_tokens:
            self.job.emit(completion.chunk(reason))
        if reason is not None and not self.running and not self._waiting:
            self.succeed(engine, None)


class PassTask(Task[ForwardBackwardJob]):
    """A forward and backward pass, in as many steps as its rows need.

    Where it is cut into micro-batches depends on the job alone, whoever shares its steps: so do its sums.
    """

    def __init__(self, job: ForwardBackwardJob, step_tokens: int) -> None:
        super().__init__(job)
        self.adapter = job.adapter
        self.state: Pass | None = None
        self._batches = micro_batches([len(row.tokens) for row in job.rows], step_tokens)
        self._batches.reverse()

    def begin(self, engine: Engine) -> None:
        """Checks that the adapter can be trained as asked."""
        super().begin(engine)
        self.state = engine.begin_pass(self.job)

    def next_cost(self) -> int:
        """Tokens of the next micro-batch; 0 when all are run."""
        return self._batches[-1][1] if self._batches else 0

    def next_rows(self) -> int:
        """How many rows the next micro-batch has."""
        return self._batches[-1][0]

    def ran(self) -> None:
        """The next micro-batch was run."""
        self._batches.pop()


class StepTask(Task[OptimStepJob | DropGradientsJob]):
    """What ends a round of passes: an optimizer step, or dropping the gradients."""

    def __init__(self, job: OptimStepJob | DropGradientsJob) -> None:
        super().__init__(job)
        self.adapter = job.adapter

    def next_cost(self) -> int:
        """None: a step has no rows."""
        return 0


def micro_batches(costs: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Cuts rows, in their order, into (rows, tokens) of at most so many tokens; a longer row stands alone."""
    found: list[tuple[int, int]] = []
    for cost in costs:
        if found and found[-1][1] + cost <= most:
            found[-1] = (found[-1][0] + 1, found[-1][1] + cost)
        else:
            found.append((1, cost))
    return found
