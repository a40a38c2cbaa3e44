"""Prompts and completions: texts tokenized, token ids checked, lengths and counts held to the limits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from onebase.server.codec.fields import required
from onebase.server.codec.tensors import check_tokens, read_tokens
from onebase.server.config import Limits
from onebase.server.errors import FailedPrecondition, InvalidArgument
from onebase.server.jobs import BaseFacts, Pooling, Tokens
from onebase.server.texts import Texts
from onebase.v1 import types_pb2

_CHARACTERS_PER_TOKEN = 100
"""A text with more characters than this for every token of the context is not even tokenized."""

_BYTES_PER_TOKEN, _BYTES_PER_SEQUENCE = 16, 256
"""What a message holds beside logits, at most."""

_NO_TOKENS: Tokens = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Pair:
    """A prompt and a completion as token ids."""

    prompt: Tokens
    completion: Tokens
    from_text: bool
    """Whether the completion was given as text."""

    @property
    def tokens(self) -> Tokens:
        """Both, in one array."""
        return np.concatenate((self.prompt, self.completion))

    @property
    def start(self) -> int:
        """Number of prompt tokens."""
        return int(self.prompt.size)


@dataclass(frozen=True)
class Joined:
    """Prompt and completion as a reward adapter reads them, before it is known whether it wants an end of sequence."""

    tokens: Tokens
    from_text: bool
    """Whether the completion was given as text."""


@dataclass(frozen=True)
class RewardTokens:
    """What a reward adapter reads of one sequence."""

    tokens: Tokens
    eos_appended: bool


class SequenceReader:
    """Reads the contents and sequences of requests for one base.

    Args:
        texts: the tokenizer.
        facts: vocabulary, context and end-of-sequence ids.
        limits: sequences and tokens per request.
    """

    def __init__(self, texts: Texts, facts: BaseFacts, limits: Limits) -> None:
        self._texts = texts
        self._facts = facts
        self._limits = limits

    async def pairs(self, sequences: Sequence[types_pb2.Sequence], fields: Sequence[str]) -> list[Pair]:
        """Sequences to compute logprobs of: each prompt and each completion has at least one token.

        Args:
            sequences: as they came.
            fields: the path of each in the request.

        Raises:
            InvalidArgument: naming the field, for whatever is wrong with one of them or with all together.
        """
        self.check_count(len(sequences), "sequences")
        pairs = [await self._pair(one, field) for one, field in zip(sequences, fields, strict=True)]
        self._check_total((pair.tokens.size for pair in pairs), "sequences")
        return pairs

    async def prompts(self, contents: Sequence[types_pb2.Content], n: int, max_new_tokens: int) -> list[Tokens]:
        """Prompts to complete `n` times each, with `max_new_tokens` left in the context.

        Raises:
            InvalidArgument: naming the field.
        """
        self.check_count(len(contents), "prompts", times=n)
        prompts = []
        for index, content in enumerate(contents):
            field = f"prompts[{index}]"
            tokens = await self._prompt(content, field)
            self._check_prompt(tokens, field)
            if tokens.size + max_new_tokens > self._facts.max_context:
                raise self._too_long(
                    "sampling.max_new_tokens",
                    f"{field} has {tokens.size} tokens, and sampling.max_new_tokens is {max_new_tokens}",
                )
            prompts.append(tokens)
        self._check_total((tokens.size for tokens in prompts), "prompts")
        return prompts

    async def joined(
        self, sequences: Sequence[types_pb2.Sequence], pairs: Sequence[Pair] | None = None
    ) -> list[Joined]:
        """Sequences to score: two texts are tokenized as one, everything else is joined as token ids.

        Args:
            sequences: as they came.
            pairs: the same sequences as `pairs()` gave them, if it was called before.

        Raises:
            InvalidArgument: naming the field.
        """
        self.check_count(len(sequences), "sequences")
        rows = []
        for index, sequence in enumerate(sequences):
            tokens = await self._joined(sequence, f"sequences[{index}]", pairs[index] if pairs else None)
            rows.append(Joined(tokens, sequence.completion.WhichOneof("value") == "text"))
        return rows

    def reward_tokens(self, joined: Sequence[Joined], append_eos: bool | None) -> list[RewardTokens]:
        """What a reward adapter reads.

        Args:
            joined: the sequences.
            append_eos: append an end-of-sequence id where it is missing; None does so for texts.

        Raises:
            InvalidArgument: naming the field.
            FailedPrecondition: NO_EOS_TOKEN.
        """
        if append_eos and not self._facts.eos_token_ids:
            raise FailedPrecondition(
                "NO_EOS_TOKEN",
                "append_eos is set, and this base has no end-of-sequence token: leave it out",
                field="append_eos",
            )
        rows = [self._with_eos(one, append_eos) for one in joined]
        for index, row in enumerate(rows):
            self._check_context(row.tokens.size, f"sequences[{index}]")
        self._check_total((row.tokens.size for row in rows), "sequences")
        return rows

    def score_at(self, tokens: Tokens, pooling: Pooling) -> int:
        """The index of the token at which a score is read.

        Where every token is the padding one, it is the first, as transformers' `GenericForSequenceClassification` does.
        """
        last = int(tokens.size) - 1
        if pooling is Pooling.LAST_TOKEN or self._facts.pad_token_id is None:
            return last
        real = np.flatnonzero(tokens != self._facts.pad_token_id)
        return int(real[-1]) if real.size else 0

    def check_logits(self, pairs: Sequence[Pair], field: str) -> None:
        """Refuses logits before every completion token that would not fit in one message.

        Raises:
            InvalidArgument: LIMIT_EXCEEDED.
        """
        tokens = sum(pair.completion.size for pair in pairs)
        size = tokens * (_BYTES_PER_TOKEN + 4 * self._facts.vocab_size) + len(pairs) * _BYTES_PER_SEQUENCE
        most = self._limits.max_message_bytes
        if size > most:
            raise InvalidArgument(
                "LIMIT_EXCEEDED",
                f"{field} is set, and the logits of {tokens} completion tokens over {self._facts.vocab_size} ids take "
                f"{size} bytes, and a message may have {most}: ask for fewer or shorter completions at once",
                field=field,
            )

    def check_count(self, count: int, field: str, *, times: int = 1) -> None:
        """Refuses no sequence at all, and more than the limit.

        Raises:
            InvalidArgument: REQUIRED; LIMIT_EXCEEDED.
        """
        if not count:
            raise required(field, "give at least one")
        most = self._limits.max_sequences_per_request
        if count * times > most:
            shown = f"{count}" if times == 1 else f"{count} times n = {times}"
            raise InvalidArgument(
                "LIMIT_EXCEEDED",
                f"{field} are {shown}, and a request may hold {most}: send several requests",
                field=field,
            )

    # ------------------------------------------------------------------------------------------ one sequence

    async def _pair(self, sequence: types_pb2.Sequence, field: str) -> Pair:
        prompt = await self._prompt(sequence.prompt, f"{field}.prompt")
        self._check_prompt(prompt, f"{field}.prompt")
        completion = await self._completion(sequence.completion, f"{field}.completion")
        self._check_context(prompt.size + completion.size, field)
        return Pair(prompt, completion, from_text=sequence.completion.WhichOneof("value") == "text")

    async def _joined(self, sequence: types_pb2.Sequence, field: str, pair: Pair | None) -> Tokens:
        kinds = (sequence.prompt.WhichOneof("value"), sequence.completion.WhichOneof("value"))
        if kinds == ("text", "text"):
            if not sequence.completion.text:
                raise self._empty_completion(f"{field}.completion.text")
            self._check_text(sequence.prompt.text, f"{field}.prompt.text")
            self._check_text(sequence.completion.text, f"{field}.completion.text")
            tokens = await self._texts.joined(sequence.prompt.text, sequence.completion.text)
            return self._checked(tokens, f"{field}.completion.text")
        if pair is not None:
            return pair.tokens
        completion = await self._completion(sequence.completion, f"{field}.completion")
        prompt = await self._prompt(sequence.prompt, f"{field}.prompt") if kinds[0] else _NO_TOKENS
        return np.concatenate((prompt, completion))

    def _with_eos(self, joined: Joined, append_eos: bool | None) -> RewardTokens:
        tokens, eos = joined.tokens, self._facts.eos_token_ids
        wanted = joined.from_text if append_eos is None else append_eos
        if not wanted or not eos or int(tokens[-1]) in eos:
            return RewardTokens(tokens, eos_appended=False)
        return RewardTokens(np.append(tokens, eos[0]), eos_appended=True)

    # ------------------------------------------------------------------------------------------- one content

    async def _prompt(self, content: types_pb2.Content, field: str) -> Tokens:
        match content.WhichOneof("value"):
            case "text":
                self._check_text(content.text, f"{field}.text")
                return self._checked(await self._texts.prompt(content.text), f"{field}.text")
            case "tokens":
                return read_tokens(content.tokens, f"{field}.tokens", self._facts.vocab_size)
            case _:
                raise required(field, "give text or tokens")

    async def _completion(self, content: types_pb2.Content, field: str) -> Tokens:
        match content.WhichOneof("value"):
            case "text":
                field = f"{field}.text"
                self._check_text(content.text, field)
                tokens = self._checked(await self._texts.completion(content.text), field)
            case "tokens":
                field = f"{field}.tokens"
                tokens = read_tokens(content.tokens, field, self._facts.vocab_size)
            case _:
                raise required(field, "give text or tokens")
        if not tokens.size:
            raise self._empty_completion(field)
        return tokens

    def _checked(self, tokens: Tokens, field: str) -> Tokens:
        """Token ids that the tokenizer made; it may know words that the base has no embedding for."""
        tokens = np.asarray(tokens, dtype=np.int64)
        check_tokens(tokens, field, self._facts.vocab_size)
        return tokens

    # ------------------------------------------------------------------------------------------------ checks

    def _check_prompt(self, tokens: Tokens, field: str) -> None:
        if not tokens.size:
            raise InvalidArgument(
                "EMPTY_PROMPT",
                f"{field} has no tokens: give at least one, such as the beginning-of-sequence token",
                field=field,
            )

    def _check_text(self, text: str, field: str) -> None:
        if len(text) > _CHARACTERS_PER_TOKEN * self._facts.max_context:
            raise self._too_long(field, f"{field} has {len(text)} characters")

    def _check_context(self, tokens: int, field: str) -> None:
        if tokens > self._facts.max_context:
            raise self._too_long(field, f"{field} has {tokens} tokens")

    def _check_total(self, sizes: Iterable[int], field: str) -> None:
        total = sum(sizes)
        most = self._limits.max_tokens_per_request
        if total > most:
            raise InvalidArgument(
                "LIMIT_EXCEEDED",
                f"{field} have {total} tokens, and a request may hold {most}: send several",
                field=field,
            )

    def _too_long(self, field: str, what: str) -> InvalidArgument:
        return InvalidArgument(
            "CONTEXT_TOO_LONG",
            f"{what}: prompt and completion together may have {self._facts.max_context}",
            field=field,
        )

    def _empty_completion(self, field: str) -> InvalidArgument:
        return InvalidArgument("EMPTY_COMPLETION", f"{field} has no tokens: a completion has at least one", field=field)
