"""The grammar of the reviews: rich, seeded, and its held-out parts are held out."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from reviews import corpus, pairs


@settings(max_examples=10)
@given(st.integers(0, 10_000))
def test_a_seed_always_writes_the_same(seed: int) -> None:
    assert list(corpus(seed, 50)) == list(corpus(seed, 50))
    assert pairs(seed, 20, held_out=False) == pairs(seed, 20, held_out=False)


def test_there_are_thousands_of_distinct_reviews() -> None:
    reviews = list(corpus(0, 6000))
    assert len(set(reviews)) > 5500
    words = {word.strip(".,") for review in reviews for word in review.split()}
    assert 250 < len(words) < 1200


def test_pairs_share_a_prompt_and_differ_in_what_follows() -> None:
    for pair in pairs(1, 200, held_out=False):
        assert pair["chosen"] != pair["rejected"]
        assert pair["prompt"].strip()
        assert pair["chosen"].startswith(" ")


def test_held_out_prompts_are_not_trained_on() -> None:
    trained = {pair["prompt"] for pair in pairs(0, 3000, held_out=False)}
    held_out = {pair["prompt"] for pair in pairs(0, 400, held_out=True)}
    assert not trained & held_out
