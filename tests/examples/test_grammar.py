"""What the reviews mean: openings are neutral, degrees follow from the sentences, and what is held out stays out."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import vocabulary as words
from common import read_jsonl, read_record
from hypothesis import given, settings
from hypothesis import strategies as st
from reviews import TONES, Writer, main, opening, opinion, pairs, prompts
from stage1_sft import BOS, EOS, train_tokenizer

SEEDS = st.integers(0, 2**32)
LOADED = {adjective for degree in (-2, -1, 1, 2) for adjective in words.ADJECTIVES[degree]}


@given(SEEDS)
def test_an_opening_says_nothing_of_how_it_was(seed: int) -> None:
    drawn = opening(random.Random(seed))
    assert not LOADED & set(drawn.text.strip(".").split())
    assert drawn.genre in drawn.text
    assert drawn.text.count(".") == 1


@given(SEEDS, st.sampled_from(list(TONES)))
def test_an_opinion_is_of_its_tone_or_a_step_nearer_to_the_middle(seed: int, tone: int) -> None:
    written = opinion(random.Random(seed), "comedy", tone)
    assert abs(tone) - 1 <= abs(written.degree) <= abs(tone) or tone == written.degree == 0
    assert written.degree * tone >= 0
    assert written.text.startswith(" ")
    assert 1 <= written.text.count(".") <= 3


@given(SEEDS, st.sampled_from([-2, -1, 1, 2]))
def test_a_concession_grants_the_other_side_first(seed: int, degree: int) -> None:
    text = Writer(random.Random(seed), "comedy").concession(degree)
    granted, main_clause = text.removeprefix("although ").replace(", but ", ", ").split(", ")
    sign = 1 if degree > 0 else -1
    assert polarity(granted) == -sign
    assert polarity(main_clause) == sign


def polarity(clause: str) -> int:
    """The sign of a clause's last word, turned around by "not" and "never"."""
    *others, adjective = clause.split()
    [degree] = [degree for degree, adjectives in words.ADJECTIVES.items() if adjective in adjectives]
    sign = (degree > 0) - (degree < 0)
    return -sign if {"not", "never"} & set(others) else sign


def test_every_adjective_has_one_degree() -> None:
    adjectives = [adjective for of_degree in words.ADJECTIVES.values() for adjective in of_degree]
    assert len(adjectives) == len(set(adjectives))


def test_there_are_thousands_of_openings() -> None:
    assert len(prompts(0, 3000, held_out=False)) == 3000


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_a_held_out_pair_shares_no_opinion_with_those_to_avoid(seed: int) -> None:
    seen = frozenset(pair[side] for pair in pairs(seed, 400, held_out=False) for side in ("chosen", "rejected"))
    held_out = {pair[side] for pair in pairs(seed, 100, held_out=True, avoid=seen) for side in ("chosen", "rejected")}
    assert not seen & held_out


def test_nothing_that_is_trained_on_begins_with_a_held_out_prompt(tmp_path: Path) -> None:
    main(tmp_path / "data", reviews=1500, train_pairs=200, heldout_pairs=50, train_prompts=200, heldout_prompts=64)
    files = {path.stem: read_jsonl(path) for path in (tmp_path / "data").iterdir()}
    assert {name: len(rows) for name, rows in files.items()} == {
        "corpus": 1500,
        "pairs": 200,
        "pairs_heldout": 50,
        "prompts": 200,
        "prompts_heldout": 64,
    }
    held_out = {row["prompt"] for name in ("prompts_heldout", "pairs_heldout") for row in files[name]}
    trained = {row["prompt"] for name in ("prompts", "pairs") for row in files[name]}
    trained |= {row["text"].split(".")[0] + "." for row in files["corpus"]}
    assert not held_out & trained
    assert read_record(tmp_path / "data")["reviews"] == 1500


@pytest.mark.parametrize("text", ["I saw this comedy. It was good.", " leading", "Ünïcode — 漢字 🙂\n\ttabs", ""])
def test_the_tokenizer_gives_any_text_back_and_keeps_its_special_tokens_apart(text: str) -> None:
    tokenizer = train_tokenizer(prompts(0, 200, held_out=False), vocab_size=400)
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert tokenizer(text + EOS)["input_ids"] == [*ids, tokenizer.eos_token_id]
    assert tokenizer.convert_tokens_to_ids(BOS) == ids[0]


def test_prompt_and_completion_tokenized_apart_are_the_whole_tokenized() -> None:
    pair = pairs(0, 1, held_out=False)[0]
    tokenizer = train_tokenizer(prompts(0, 200, held_out=False), vocab_size=400)
    apart = tokenizer(pair["prompt"])["input_ids"] + tokenizer(pair["chosen"], add_special_tokens=False)["input_ids"]
    assert apart == tokenizer(pair["prompt"] + pair["chosen"])["input_ids"]
