"""Completions on their way: which begin together, what each has so far, when it is over.

A request's completions are all made by the version that was newest when it began. One that gives up its slot goes on
later, from its tokens, as if nothing had happened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from onebase.server import failpoints
from onebase.server.errors import FailedPrecondition, ResourceExhausted
from onebase.server.jobs import CompletionChunk, FinishReason, GenerateJob
from onebase.server.memory import is_out_of_memory
from onebase.server.tasks import Task

if TYPE_CHECKING:
    from onebase.server.engine.adapters import Weights
    from onebase.server.engine.engine import Drawn, Engine
    from onebase.server.engine.text import Detokenizer

SHARE = 4
"""One in so many tokens of a step may be prompts that a request begins together."""

HEADROOM = 32
"""Tokens that a completion should be able to write before it may have to make room again."""


@dataclass(eq=False)
class Completion:
    """One completion under way."""

    task: GenerateTask
    prompt_index: int
    completion_index: int
    slot: int = -1
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    text: str = ""
    detokenizer: Detokenizer | None = None  # from when its text is wanted
    read_tokens: int = 0  # by the detokenizer
    sent_tokens: int = 0
    sent_text: int = 0
    starved: int = -1  # its length when it had the cache for itself, and memory ran out

    @property
    def place(self) -> tuple[int, int, int]:
        """Where its next token belongs: (prompt, completion, position)."""
        return self.prompt_index, self.completion_index, len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.task.job.prompts[self.prompt_index]) + len(self.tokens)

    @property
    def all_tokens(self) -> list[int]:
        """Prompt and completion."""
        prompt: list[int] = self.task.job.prompts[self.prompt_index].tolist()
        return prompt + self.tokens

    def like(self, other: Completion) -> bool:
        """Whether both begin now, from the same prompt."""
        return self.prompt_index == other.prompt_index and not self.tokens and not other.tokens

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
            raise FailedPrecondition(
                "NONFINITE_LOGITS",
                "the policy's logits are not finite, or every token that could come is banned: load an earlier "
                "version, or ask for fewer stop_token_ids",
            )
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
        if self.detokenizer is None and (reason is not None or sampling.stop or self.task.job.stream_tokens):
            self.detokenizer = engine.detokenizer(self.task.job.prompts[self.prompt_index])
        if self.detokenizer is not None:
            fresh, searched = self.tokens[self.read_tokens :], len(self.text)
            self.read_tokens = len(self.tokens)
            self.text += self.detokenizer.add(fresh, last=reason is not None)
            found = (self.text.find(stop, max(0, self.sent_text, searched - len(stop) + 1)) for stop in sampling.stop)
            if stops := [at for at in found if at >= 0]:
                self.text, reason = self.text[: min(stops)], FinishReason.STOP_STRING
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


@dataclass(eq=False)
class Prefill:
    """A prompt on its way into the cache, for the completions that begin from it; long ones take several steps."""

    completions: list[Completion]
    tokens: list[int]
    done: int  # tokens that are in the cache
    stop: int  # where the next step ends

    @property
    def whole(self) -> bool:
        """Whether the next step brings the last token, so that the completions get theirs."""
        return self.stop == len(self.tokens)


class GenerateTask(Task[GenerateJob]):
    """Prompts to complete. All completions are made by the version that was newest when the task began.

    Args:
        job: the request.
        step_tokens: most tokens of a prompt in one step; asked anew for each.
    """

    def __init__(self, job: GenerateJob, step_tokens: Callable[[], int]) -> None:
        super().__init__(job)
        self.weights: Weights | None = None
        self.running: list[Completion] = []
        self.filling: list[Prefill] = []  # several short prompts, or one long one
        self._step_tokens = step_tokens
        self._waiting = [Completion(self, p, c) for p in range(len(job.prompts)) for c in range(job.n)]
        self._waiting.reverse()

    def begin(self, engine: Engine) -> None:
        """Binds the policy.

        Raises:
            ResourceExhausted: a completion could never be held by the cache.
        """
        super().begin(engine)
        longest = max(len(prompt) for prompt in self.job.prompts) + self.job.sampling.max_new_tokens
        if not engine.kv.holds(longest):
            raise ResourceExhausted(
                "KV_CACHE_TOO_SMALL",
                f"prompt and max_new_tokens are {longest} tokens, more than the server's key-value cache holds: ask "
                "for fewer, or serve with more --kv-bytes",
                field="sampling.max_new_tokens",
            )
        self.weights = engine.bind(self.job.adapter, self.job.version)

    def release(self, engine: Engine) -> None:
        """Gives the version and the slots back."""
        engine.release(self.weights)
        for completion in self.running:
            self._leave(engine, completion)
        for filling in self.filling:
            self._leave_filling(engine, filling)
        self.running, self.filling = [], []

    @property
    def under_way(self) -> bool:
        """Whether its next prompts only go on, in the slots that they have."""
        return bool(self.filling)

    def next_slots(self) -> int:
        """Slots that its next prompts can use, one for each completion; 0 if those prompts are under way."""
        return 0 if self.filling else len(self._next())

    def next_length(self) -> int:
        """Tokens that each of these slots must hold: what is there, and some room to write, if as much will come."""
        return max(self._wanted_length(completion) for completion in self._next())

    def next_cost(self) -> int:
        """Tokens of its next prompts, or of the next part of a long one; 0 when all completions have begun."""
        if self.filling:
            total = sum(len(one.tokens) - one.done for one in self.filling)
        else:
            together = self._next()
            firsts = [one for at, one in enumerate(together) if not (at and one.like(together[at - 1]))]
            total = sum(one.length for one in firsts)
        return min(total, self._step_tokens())

    def _next(self) -> list[Completion]:
        """The completions that begin together: those of one prompt, and of more while they are short."""
        found: list[Completion] = []
        total, together = 0, self._step_tokens() // SHARE
        for completion in reversed(self._waiting):
            if not (found and completion.like(found[-1])):
                total += completion.length
                if found and total > together:
                    break
            found.append(completion)
        return found

    def _wanted_length(self, completion: Completion) -> int:
        most = completion.length - len(completion.tokens) + self.job.sampling.max_new_tokens
        return min(completion.length + HEADROOM, most)

    def take(self, engine: Engine) -> list[Prefill]:
        """The next prompts, or a part of one, each with as many of its completions as there are slots for."""
        if not self.filling:
            self._begin_prompts(engine, len(self._next()))
        for one in self.filling:
            one.stop = min(one.done + self._step_tokens(), len(one.tokens))
        return list(self.filling)

    def _begin_prompts(self, engine: Engine, most: int) -> None:
        """Begins so many completions, as far as there are slots."""
        until = len(self._waiting) - most
        while len(self._waiting) > until:
            tokens = self._waiting[-1].all_tokens
            if engine.kv.worth_waiting(self._key, tokens, [one.tokens for one in self.filling]):
                break
            begun = self._begin_prompt(engine)
            if begun is None:
                break
            self.filling.append(begun)

    def _begin_prompt(self, engine: Engine) -> Prefill | None:
        first = self._waiting[-1]
        tokens = first.all_tokens
        source, shared = engine.kv.shared(self._key, tokens)  # looked up before a slot is taken: it may be that one
        shared = max(0, min(shared, len(tokens) - 1))  # the last token is run, for what comes after it
        places = engine.kv.free(self._wanted_length(first))
        begun: list[Completion] = []
        while self._waiting and len(begun) < places and (not begun or self._waiting[-1].like(first)):
            completion = self._waiting.pop()
            completion.slot = engine.kv.take(source, shared)
            begun.append(completion)
        if not begun:
            return None
        if shared and source != first.slot:
            try:
                engine.kv.copy(source, [first.slot], shared)
            except Exception as error:
                if not is_out_of_memory(error):
                    self._leave_slots(engine, begun)
                    raise
                shared = 0  # to copy is only quicker than to run it
        return Prefill(begun, tokens, shared, shared)

    @property
    def _key(self) -> tuple[int, int]:
        """What made a slot's numbers: the adapter and its version."""
        return (0, 0) if self.weights is None else (self.weights.serial, self.weights.version)

    def share(self, engine: Engine, filling: Prefill) -> None:
        """Once a prompt is in the cache, gives it to all that begin from it; may be done twice."""
        if filling.whole:
            failpoints.hit("share")
            first, others = filling.completions[0], filling.completions[1:]
            engine.kv.copy(first.slot, [completion.slot for completion in others], filling.stop)

    def filled(self, engine: Engine, filling: Prefill) -> None:
        """The step is done: a prompt, or a part of it, is in the cache, and shared."""
        filling.done = filling.stop
        engine.kv.note(filling.completions[0].slot, self._key, filling.tokens[: filling.done])
        if filling.done == len(filling.tokens):
            self.running += filling.completions
            self.filling.remove(filling)

    def withdraw(self, engine: Engine, filling: Prefill) -> None:
        """Takes the slots of a prompt on its way into the cache away; it begins anew later."""
        self.filling.remove(filling)
        self._leave_filling(engine, filling)
        self._waiting += reversed(filling.completions)

    def preempt(self, engine: Engine, completion: Completion) -> None:
        """Takes a running completion's slot away; it goes on later, from its tokens, as if nothing had happened."""
        self.running.remove(completion)
        self._leave(engine, completion)
        self._waiting.append(completion)

    def accept(self, engine: Engine, completion: Completion, drawn: Drawn) -> None:
        """Gives a completion its next token; sends what is new; the last completion ends the task."""
        reason = completion.add(drawn, engine.facts.eos_token_ids, engine)
        if reason is not None:
            self.running.remove(completion)
            self._leave(engine, completion)
        if reason is not None or self.job.stream_tokens:
            self.job.emit(completion.chunk(reason))
        if reason is not None and not (self.running or self._waiting or self.filling):
            self.succeed(engine, None)

    def _leave(self, engine: Engine, completion: Completion) -> None:
        """Gives a slot back, saying what it holds: all but the last token, which was drawn and not yet run."""
        held = completion.all_tokens[:-1] if completion.tokens else []
        engine.kv.give_back(completion.slot, self._key, held)
        completion.slot = -1

    def _leave_slots(self, engine: Engine, completions: Sequence[Completion]) -> None:
        """Gives slots back that hold nothing worth keeping."""
        for completion in completions:
            engine.kv.give_back(completion.slot)
            completion.slot = -1

    def _leave_filling(self, engine: Engine, filling: Prefill) -> None:
        """Gives the slots of a prompt on its way back, saying how far it is in the cache."""
        for completion in filling.completions:
            held = filling.tokens[: filling.done] if completion is filling.completions[0] else []
            engine.kv.give_back(completion.slot, self._key, held)
            completion.slot = -1
