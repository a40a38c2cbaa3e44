"""Reward, Logprob, ReferenceLogprob, Score and Generate say what transformers, PEFT and TRL say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from oracle.fixtures import (
    POLICIES,
    REWARDS,
    assert_close,
    assert_rows_close,
    expected_scores,
    of_completions,
    sequences,
)

from onebase.client import Client
from onebase.client.types import SamplingParams, Sequence

Connect = Callable[[str], Client]

EVERY_BASE = pytest.mark.parametrize("base", REWARDS)
EVERY_REWARD = pytest.mark.parametrize(
    ("base", "adapter"), [(b, name) for b, names in REWARDS.items() for name in names]
)
EVERY_POLICY = pytest.mark.parametrize(
    ("base", "adapter"), [(b, name) for b, names in POLICIES.items() for name in names]
)


@EVERY_REWARD
def test_reward_is_the_logit_of_sequence_classification_and_trls_score_under_any_padding(
    client_of: Connect, base: str, adapter: str
) -> None:
    rewards = client_of(base).reward(sequences(base), adapter)
    found = [reward.score for reward in rewards]
    expected = expected_scores(base)["rewards"][adapter]
    for padding in ("right_padded", "left_padded", "alone", "trl_last_token", "trl_last_token_left_padded"):
        assert_close(found, expected[padding], padding)
    assert [reward.tokens[adapter] for reward in rewards] == [len(ids) for ids in expected_scores(base)["sequences"]]


@EVERY_REWARD
def test_reward_at_every_token_is_trls(client_of: Connect, base: str, adapter: str) -> None:
    rewards = client_of(base).reward(sequences(base), adapter, per_token=True)
    found = [reward.token_scores[adapter] for reward in rewards if reward.token_scores is not None]
    assert_rows_close(found, expected_scores(base)["rewards"][adapter]["trl_token_scores"], adapter)


@EVERY_BASE
def test_texts_are_scored_as_reward_trainer_tokenizes_them(client_of: Connect, base: str) -> None:
    expected = expected_scores(base)["texts"]
    texts = [Sequence(text["prompt"], text["completion"]) for text in expected]
    name = REWARDS[base][0]
    rewards = client_of(base).reward(texts, name)
    assert [reward.tokens[name] for reward in rewards] == [text["tokens"] for text in expected]
    assert all(reward.eos_appended[name] for reward in rewards)
    assert_close([reward.score for reward in rewards], [text["score"] for text in expected], "texts")


@EVERY_POLICY
def test_policy_logprobs_and_entropies_are_pefts_and_values_trls(client_of: Connect, base: str, adapter: str) -> None:
    results = client_of(base).logprob(sequences(base), adapter=adapter, entropy=True, values=True)
    expected = expected_scores(base)["policies"][adapter]
    for name, found in (
        ("logprobs", [result.logprobs for result in results]),
        ("entropies", [result.entropy for result in results]),
        ("values", [result.values for result in results]),
    ):
        assert_rows_close(found, of_completions(base, expected[name]), name)


@EVERY_BASE
def test_reference_logprobs_are_the_bare_bases(client_of: Connect, base: str) -> None:
    expected = of_completions(base, expected_scores(base)["reference"]["logprobs"])
    results = client_of(base).reference_logprob(sequences(base))
    assert_rows_close([result.logprobs for result in results], expected, "reference")


def test_score_gives_all_of_ppos_numbers_in_one_call(client_of: Connect) -> None:
    expected = expected_scores("base")
    with client_of("base").open_session("policy_all") as session:
        scores = session.score(sequences("base"), rewards={"reward": 1.0, "reward_2": -0.5})
    policy = expected["policies"]["policy_all"]
    for found, wanted, name in (
        ([score.logprobs for score in scores], policy["logprobs"], "logprobs"),
        ([score.values for score in scores], policy["values"], "values"),
        ([score.reference_logprobs for score in scores], expected["reference"]["logprobs"], "reference"),
    ):
        assert_rows_close(found, of_completions("base", wanted), name)
    raw = {name: np.array(rewards["alone"]) for name, rewards in expected["rewards"].items()}
    for name, wanted in raw.items():
        assert_close([score.scores[name] for score in scores], wanted, name)
    assert_close([score.reward for score in scores], raw["reward"] - 0.5 * raw["reward_2"], "weighted sum")


@EVERY_POLICY
def test_greedy_completions_are_those_of_the_peft_model(client_of: Connect, base: str, adapter: str) -> None:
    assert _greedy(client_of(base), base, adapter) == expected_scores(base)["policies"][adapter]["greedy"]


@EVERY_BASE
def test_greedy_completions_of_the_base_are_those_of_transformers(client_of: Connect, base: str) -> None:
    assert _greedy(client_of(base), base, "base") == expected_scores(base)["reference"]["greedy"]


def _greedy(client: Client, base: str, adapter: str) -> list[list[int]]:
    prompts = [sequence.prompt for sequence in sequences(base)]
    completions = client.generate(prompts, adapter=adapter, sampling=SamplingParams(max_new_tokens=12, temperature=0))
    by_prompt = sorted(completions, key=lambda completion: completion.prompt_index)
    return [completion.tokens.tolist() for completion in by_prompt]
