"""Texts, conversations and tokens of the base's tokenizer.

A completion's text is what follows the prompt, to the character: no space is put before it when it is tokenized, and
none is lost when it is decoded, also with tokenizers that begin every text with one (sentencepiece's).

As transformers does, special tokens that are written out in a text ("</s>") become those tokens; token ids say
exactly what is meant.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from onebase.server.jobs import Message, Tokens

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 8
"""Tokens that are decoded with a new one: more than the bytes of a character, so the new one is read right."""


class Text:
    """The base's tokenizer, twice: one thread may encode while another decodes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.decoder = copy.deepcopy(tokenizer)  # the device's thread has this one
        self._silent = {i: token.special for i, token in tokenizer.added_tokens_decoder.items()}
        self._going_on: Tokenizer | None = None  # for texts that go on, where others get a space in front
        self._bytes: dict[int, int] = {}  # tokens that stand for bytes
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            settings = json.loads(backend.to_str())
            self._going_on = _without_prefix_space(settings)
            if "ByteFallback" in json.dumps(settings["decoder"]):
                vocabulary = tokenizer.get_vocab()
                names = {byte: f"<0x{byte:02X}>" for byte in range(256)}
                self._bytes = {vocabulary[name]: byte for byte, name in names.items() if name in vocabulary}

    def encode_prompt(self, text: str) -> Tokens:
        """Ids of a text that begins a sequence, with the tokenizer's own special tokens in front (but none behind)."""
        ids = self._ids(text, special=True)
        end = self.tokenizer.eos_token_id
        if ids and ids[-1] == end and self._ids(text, special=False)[-1:] != [end]:
            ids.pop()  # this tokenizer also appends an end token; the completion comes there
        return np.asarray(ids, dtype=np.int64)

    def encode_completion(self, text: str) -> Tokens:
        """Ids of a text that goes on with a sequence, without special tokens."""
        if self._going_on is None:
            ids = self._ids(text, special=False)
        else:
            ids = self._going_on.encode(text, add_special_tokens=False).ids
        return np.asarray(ids, dtype=np.int64)

    def encode_joined(self, prompt: str, completion: str) -> Tokens:
        """Ids of both texts tokenized as one, as reward trainers do."""
        return self.encode_prompt(prompt + completion)

    def encode_chat(self, messages: Sequence[Message], *, generation_prompt: bool) -> Tokens:
        """Ids of a conversation as the chat template renders it; the template writes its special tokens itself.

        Raises:
            ValueError: the template refuses these messages; the message says why.
        """
        return np.asarray(self._render(messages, generation_prompt, tokenize=True), dtype=np.int64)

    def encode_reply(self, prompt: Sequence[Message], completion: Sequence[Message]) -> Tokens | None:
        """Ids of what the chat template adds to a prompt for a completion.

        Where its first characters would make one token with the prompt's last ones, they are tokenized by themselves:
        a policy that was given the prompt could not have written them otherwise.

        Returns:
            None if the template renders the prompt in another way once the completion stands behind it.

        Raises:
            ValueError: the template refuses these messages; the message says why.
        """
        messages = [*prompt, *completion]
        before = self.encode_chat(prompt, generation_prompt=True)
        whole = self.encode_chat(messages, generation_prompt=False)
        if np.array_equal(whole[: before.size], before):
            return whole[before.size :]
        start: str = self._render(prompt, True, tokenize=False)
        text: str = self._render(messages, False, tokenize=False)
        return self.encode_completion(text[len(start) :]) if text.startswith(start) else None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out; bytes that are no character become U+FFFD."""
        text: str = self.decoder.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if self._bytes and _BROKEN in text:
            # The tokenizer would drop all characters that are spelled in bytes beside a broken one.
            return str(self.decoder.backend_tokenizer.decoder.decode(list(self._pieces(ids))))
        return text

    def silent(self, token: int) -> bool:
        """Whether a token has no text: a special one, or an id that only the base knows."""
        found = self._silent.get(token)
        if found is None:
            found = self._silent[token] = self.decoder.convert_ids_to_tokens(token) is None
        return found

    def _render(self, messages: Sequence[Message], generation_prompt: bool, *, tokenize: bool) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=generation_prompt,
                tokenize=tokenize,
                return_dict=False,
            )
        except Exception as error:  # a template is a program, and may fail in any way
            raise ValueError(f"the chat template fails with these messages: {error}") from error

    def _pieces(self, ids: Sequence[int]) -> Iterator[str]:
        """Tokens as strings; those that are bytes are put together, and give one string for each character."""
        spoken = [token for token in ids if not self.silent(token)]
        for is_bytes, run in groupby(spoken, self._bytes.__contains__):
            if is_bytes:
                yield from bytes(self._bytes[token] for token in run).decode(errors="replace")
            else:
                yield from self.decoder.convert_ids_to_tokens(list(run))

    def _ids(self, text: str, *, special: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids


class Detokenizer:
    """The text of one completion as its tokens come; a character is given out only when all its bytes are there.

    Decodes a short window of tokens each time, so that a token's text may depend on those before it (spaces of
    sentencepiece, bytes of a broken character) at a cost that does not grow with the completion.

    Args:
        text: the tokenizer.
        prompt: what the completion follows. Of a character that it leaves unfinished, the completion has the whole.
    """

    def __init__(self, text: Text, prompt: Tokens) -> None:
        self._text = text
        self._window: list[int] = []
        self._given = 0  # characters of the window's text that were given out, or are the prompt's
        for token in reversed(prompt):
            if not text.silent(int(token)):
                self._window.insert(0, int(token))
            if len(self._window) >= _CONTEXT and text.decode(self._window):
                break
        self._given = len(text.decode(self._window))
        self._unfinished = text.decode(self._window).endswith(_BROKEN)

    def add(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """Takes the next tokens and returns the text that is now certain; `last` gives out the rest, broken or not."""
        self._window += [token for token in tokens if not self._text.silent(token)]
        now = self._text.decode(self._window)
        if self._unfinished and len(now) >= self._given and not now[: self._given].endswith(_BROKEN):
            self._given -= 1  # the prompt's last character is whole now
            self._unfinished = False
        certain = len(now) if last or not now.endswith(_BROKEN) else len(now) - 1
        piece = now[self._given : certain]
        self._given = max(self._given, certain)
        self._unfinished = self._unfinished and not piece
        if len(self._window) > 2 * _CONTEXT and not last:
            self._shorten(len(now) - self._given)
        return piece

    def _shorten(self, missing: int) -> None:
        """Forgets old tokens, but none of the `missing` characters that were not yet given out."""
        short = self._window[-_CONTEXT:]
        text = self._text.decode(short)
        if len(text) > missing:
            self._window, self._given = short, len(text) - missing


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer can render conversations: it has a template, or several and one is the default."""
    try:
        return bool(tokenizer.get_chat_template())
    except ValueError:  # how transformers says that there is none
        return False


def _without_prefix_space(settings: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer of these settings, but for the space that it puts before every text; None if it puts none."""
    changed = {**settings, **{part: _no_prefix(settings[part]) for part in ("normalizer", "pre_tokenizer")}}
    return None if changed == settings else Tokenizer.from_str(json.dumps(changed))


def _no_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer without what puts a space before a text; None if nothing else is left."""
    match part:
        case {"type": "Prepend"}:
            return None
        case {"type": "Metaspace"}:
            return {**part, "prepend_scheme": "never"}
        case {"type": "ByteLevel"}:
            return {**part, "add_prefix_space": False}
        case {"type": "Sequence"}:
            key = "normalizers" if "normalizers" in part else "pretokenizers"
            return {**part, key: [kept for one in part[key] if (kept := _no_prefix(one)) is not None]}
    return part
