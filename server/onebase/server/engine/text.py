"""Texts and tokens of the base's tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from onebase.server.jobs import Tokens

_BROKEN = "�"


class Text:
    """The base's tokenizer, twice: one thread may encode while another decodes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._decoder = copy.deepcopy(tokenizer)

    def encode_prompt(self, text: str) -> Tokens:
        """Ids of a text that begins a sequence, with the tokenizer's own special tokens in front (but none behind)."""
        ids = self._ids(text, special=True)
        end = self.tokenizer.eos_token_id
        if ids and ids[-1] == end and self._ids(text, special=False)[-1:] != [end]:
            ids.pop()  # this tokenizer also appends an end token; the completion comes there
        return np.asarray(ids, dtype=np.int64)

    def encode_completion(self, text: str) -> Tokens:
        """Ids of a text that goes on with a sequence, without special tokens."""
        return np.asarray(self._ids(text, special=False), dtype=np.int64)

    def encode_joined(self, prompt: str, completion: str) -> Tokens:
        """Ids of both texts tokenized as one, as reward trainers do."""
        return self.encode_prompt(prompt + completion)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        text: str = self._decoder.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _ids(self, text: str, *, special: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids


class Detokenizer:
    """The text of one completion as its tokens come; a character is given out only when all its bytes are there.

    Decodes a short window of tokens each time, so that a token's text may depend on the one before it (spaces of
    sentencepiece, bytes of a broken character) at a cost that does not grow with the completion.
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self._tokens: list[int] = []
        self._context = 0  # first token of the window
        self._given = 0  # tokens whose text was given out

    def add(self, token: int, *, last: bool = False) -> str:
        """Takes a token and returns the text that is now certain; `last` gives out the rest, broken or not."""
        self._tokens.append(token)
        before = self._text.decode(self._tokens[self._context : self._given])
        now = self._text.decode(self._tokens[self._context :])
        if len(now) <= len(before) or (now.endswith(_BROKEN) and not last):
            return now[len(before) :] if last else ""
        self._context, self._given = self._given, len(self._tokens)
        return now[len(before) :]
