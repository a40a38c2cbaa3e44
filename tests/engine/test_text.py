"""Texts there and back: to the character, in pieces, with the tokenizers that matter."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from engine import tokenizers_made
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from onebase.server.engine.text import Detokenizer, Text

BROKEN = "\N{REPLACEMENT CHARACTER}"
KINDS = tuple(tokenizers_made.ALL)
PIECES = (
    *("film", " good", "  ", "\n", "é", "e\u0301", "ß", "中文", "映画", "한국어", "नमस्ते", "ไทย"),
    *("مرحبا", "שלום", "\u200f", "😀", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "\u200d", "\ufe0f", "𝕏", "𠮷", "<0x41>", "▁", BROKEN),
)
TEXTS = st.one_of(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.text(max_size=30))


@cache
def text_of(kind):
    return Text(tokenizers_made.ALL[kind]())


def ids_of(kind, text):
    """Ids of a text, special tokens not parsed, so that every text comes back as it is."""
    return text_of(kind).encode_completion(text).tolist()


def pieces(text, prompt, tokens):
    detokenizer = Detokenizer(text, np.asarray(prompt, np.int64))
    return [detokenizer.add([token], last=at == len(tokens) - 1) for at, token in enumerate(tokens)]


def following(text, prompt, tokens):
    """What the decoded whole has more than the decoded prompt."""
    before, whole = text.decode(prompt), text.decode([*prompt, *tokens])
    assert whole.startswith(before)
    return whole[len(before) :]


def representable(kind, text):
    """sentencepiece writes spaces as ▁ and cannot tell the two apart."""
    return kind == "byte_level" or "▁" not in text


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(prompt=TEXTS, completion=TEXTS)
@example(prompt="The film", completion=" was good")
@example(prompt="The film", completion="s")
@example(prompt="", completion=" ")
@example(prompt="", completion="filmfilmfilme\u0301film<0x41>")
@example(prompt="a", completion="👩‍👩‍👧‍👦")
def test_a_completions_text_goes_there_and_comes_back_in_pieces_as_it_was(kind, prompt, completion):
    assume(representable(kind, completion) and representable(kind, prompt))
    text = text_of(kind)
    before = [*text.encode_prompt(prompt).tolist(), *ids_of(kind, "x")]  # not at the very beginning, where ▁ is nothing
    tokens = ids_of(kind, completion)

    given_out = pieces(text, before, tokens)

    assert "".join(given_out) == completion
    assert BROKEN in completion or not any(BROKEN in piece for piece in given_out)
    assert "".join(given_out) == following(text, before, tokens)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_tokens_give_the_same_text_in_pieces_and_at_once(kind, data):
    text = text_of(kind)
    size = len(text.tokenizer)
    # A base may have more embeddings than its tokenizer has tokens; and many of sentencepiece's shall be bytes.
    ids = st.one_of(st.integers(0, size + 3), st.integers(3, 258))
    prompt = data.draw(st.lists(ids, max_size=20))
    tokens = data.draw(st.lists(ids, min_size=1, max_size=60))

    given_out = pieces(text, prompt, tokens)

    at_once = Detokenizer(text, np.asarray(prompt, np.int64)).add(tokens, last=True)
    assert "".join(given_out) == at_once
    if not text.decode(prompt).endswith(BROKEN):
        assert at_once == following(text, prompt, tokens)


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 399), min_size=1, max_size=60))
def test_bytes_that_are_no_character_are_broken_where_the_tokenizer_says_so(tokens):
    text = text_of("byte_level")

    assert "".join(pieces(text, [], tokens)) == text.tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_broken_byte_takes_no_other_character_with_it():
    text = text_of("llama_2")
    smile = text.tokenizer.convert_tokens_to_ids(["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"])

    given_out = pieces(text, ids_of("llama_2", "x"), [*smile, smile[1], *smile])

    assert "".join(given_out) == f"😀{BROKEN}😀"


def test_a_character_that_the_prompt_leaves_unfinished_comes_whole():
    text = text_of("llama_2")
    smile = text.tokenizer.convert_tokens_to_ids(["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"])
    prompt = [*ids_of("llama_2", "x"), *smile[:2]]

    assert pieces(text, prompt, [*smile[2:], *ids_of("llama_2", "y")]) == ["", "😀", "y"]
    assert "".join(pieces(text, prompt, ids_of("llama_2", "y"))) == "y"


@pytest.mark.parametrize("kind", KINDS)
def test_the_window_stays_short_whatever_is_written(kind, monkeypatch):
    text = text_of(kind)
    broken = text.tokenizer.convert_tokens_to_ids("<0x80>") if kind != "byte_level" else None
    broken = broken if broken is not None else text.tokenizer.convert_tokens_to_ids("Ģ")  # the byte 0x80 in letters
    decode, sizes = text.decode, []
    monkeypatch.setattr(text, "decode", lambda ids: (sizes.append(len(ids)), decode(ids))[1])
    for writing in ([broken], [1], [10**6], ids_of(kind, "a film"), ids_of(kind, "😀"), ids_of(kind, "  ")):
        detokenizer = Detokenizer(text, np.zeros(0, np.int64))
        for token in writing * 100:
            detokenizer.add([token])
    assert max(sizes) <= 20


def test_a_prompt_gets_the_tokenizers_space_and_a_completion_does_not():
    for kind in ("llama_2", "metaspace"):
        text = text_of(kind)
        names = text.tokenizer.convert_ids_to_tokens
        assert "".join(names(text.encode_prompt("film"))) == "<s>▁film"
        assert "".join(names(text.encode_completion(" film"))) == "▁film"
        assert "".join(names(text.encode_completion("film"))) == "film"
    prefixed = Text(tokenizers_made.byte_level(prefix_space=True))
    assert prefixed.decode(prefixed.encode_completion("film").tolist()) == "film"


def test_special_tokens_in_a_text_are_those_tokens():
    for kind in KINDS:
        text = text_of(kind)
        assert 1 in text.encode_completion("a</s>b").tolist()
        assert text.tokenizer("a</s>b")["input_ids"] == text.encode_prompt("a</s>b").tolist()
