"""Reward terms: labels, weights, who gets an end of sequence, and where scores are read."""

from __future__ import annotations

from dataclasses import replace

import grpc
import numpy as np
import pytest
from server.conftest import bind
from server.fakes import FACTS, FakeWorker, token_scores
from server.harness import Live, array, pair, refused

from onebase.server.jobs import AdapterKind, Pooling
from onebase.v1 import adapters_pb2, inference_pb2, types_pb2

S = inference_pb2
PAD = 2  # which is also the end of sequence, as where a tokenizer has no padding token of its own


@pytest.fixture
def live():
    """A server whose padding is its end of sequence, with a policy p1, a reward r1, and r3 of three labels."""
    with Live(worker=FakeWorker(facts=replace(FACTS, pad_token_id=PAD))) as server:
        server.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(name="p1", value_head=True))
        server.on_loop(bind, server, "r1", AdapterKind.REWARD)
        server.on_loop(lambda: bind(server, "r3", AdapterKind.REWARD, num_labels=3))
        yield server


def reward(live, rewards, *sequences, **more):
    return live.inference.Reward(S.RewardRequest(rewards=rewards, sequences=sequences or [pair((5,), (6,))], **more))


def score(live, rewards, *sequences, **more):
    request = S.ScoreRequest(ppo_adapter_name="p1", rewards=rewards, sequences=sequences, outputs=[4], **more)
    return live.inference.Score(request)


def tokens(*ids):
    return np.array(ids, dtype=np.int64)


# ------------------------------------------------------------------------------------------------------- labels


def test_labels_of_one_adapter_share_a_row_and_are_summed_by_weight(live):
    uid, other = live.uid("r3"), live.uid("r1")
    terms = [
        {"adapter": "r3", "label": 2, "weight": 2.0},
        {"adapter": "r1"},
        {"adapter": "r3", "label": 0, "weight": -0.5},
    ]
    row = tokens(5, 6, 7)
    expected = [float(token_scores(*one)[-1]) for one in ((uid, row, 2), (other, row, 0), (uid, row, 0))]

    response = reward(live, terms, pair((5,), (6, 7)), pair((5,), (6, 7)), per_token=True)

    assert len(live.worker.executed[-1].rows) == 4  # two adapters, two sequences
    for result in response.results:
        assert list(result.scores) == expected
        assert result.reward == 2.0 * expected[0] + expected[1] - 0.5 * expected[2]
        for tensor, (adapter, label) in zip(result.token_scores, ((uid, 2), (other, 0), (uid, 0)), strict=True):
            np.testing.assert_array_equal(array(tensor), token_scores(adapter, row, label))
    assert [one.name for one in response.rewards] == ["r3", "r1", "r3"]

    (result,) = score(live, terms, pair((5,), (6, 7))).results
    assert list(result.scores) == expected
    assert result.reward == 2.0 * expected[0] + expected[1] - 0.5 * expected[2]


@pytest.mark.parametrize(
    ("terms", "reason", "field", "said"),
    [
        ([{"adapter": "r1"}, {"adapter": "r3"}], "REQUIRED", "rewards[1].label", "has 3 labels: give one of 0 to 2"),
        ([{"adapter": "r3", "label": 3}], "OUT_OF_RANGE", "rewards[0].label", "is 3: use 0 to 2, the labels of 'r3'"),
        ([{"adapter": "r3", "label": -1}], "OUT_OF_RANGE", "rewards[0].label", "is -1: use 0 to 2"),
        ([{"adapter": "r1", "label": 1}], "OUT_OF_RANGE", "rewards[0].label", "is 1: use 0 to 0"),
        (
            [{"adapter": "r3", "label": 1}, {"adapter": "r1"}, {"adapter": "r3", "label": 1}],
            "DUPLICATE_TERM",
            "rewards[2].adapter",
            "label 1 of 'r3' again",
        ),
        ([{"adapter": "r1"}, {"adapter": "r1", "label": 0}], "DUPLICATE_TERM", "rewards[1].adapter", "label 0 of"),
        ([{"adapter": "r1", "weight": float("nan")}], "NOT_FINITE", "rewards[0].weight", "nan"),
    ],
)
def test_what_is_no_term_is_refused(live, terms, reason, field, said):
    for ask in (reward, score):
        refusal = refused(ask, live, terms, pair((5,), (6,)))
        assert (refusal.code, refusal.reason, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, reason, field)
        assert said in refusal.message


def test_the_only_reward_must_be_named_where_it_has_several_labels(live):
    live.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="r1"))
    refusal = refused(reward, live, [])
    assert (refusal.reason, refusal.field) == ("REQUIRED", "rewards")
    assert "'r3', has 3 labels" in refusal.message


# ---------------------------------------------------------------------------------------------- end of sequence


@pytest.mark.parametrize(
    ("asked", "declared", "text", "ids"),
    [
        (None, None, True, False),
        (None, True, True, True),
        (None, False, False, False),
        (True, False, True, True),
        (False, True, False, False),
    ],
)
def test_an_end_of_sequence_is_appended_as_asked_or_declared_or_to_texts(live, asked, declared, text, ids):
    live.on_loop(lambda: bind(live, "r4", AdapterKind.REWARD, append_eos=declared))
    for ask in (reward, score):
        response = ask(live, [{"adapter": "r4"}], pair("#5", "#6"), pair((5,), (6,)), append_eos=asked)
        assert [list(result.eos_appended) for result in response.results] == [[text], [ids]]
    facts = live.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name="r4"))
    assert (facts.append_eos if facts.HasField("append_eos") else None) == declared


def test_adapters_of_one_call_each_read_what_they_declare(live):
    live.on_loop(lambda: bind(live, "ends", AdapterKind.REWARD, append_eos=True))
    live.on_loop(lambda: bind(live, "plain", AdapterKind.REWARD, append_eos=False))
    terms = [{"adapter": "ends"}, {"adapter": "plain"}, {"adapter": "r1"}]

    (result,) = reward(live, terms, pair("#5", "#6"), per_token=True).results

    assert list(result.eos_appended) == [True, False, True]
    assert list(result.tokens) == [4, 3, 4]
    assert [list(tensor.shape) for tensor in result.token_scores] == [[4], [3], [4]]
    assert list(result.scores) == [
        float(token_scores(live.uid(name), row)[-1])
        for name, row in (("ends", tokens(1, 5, 6, 2)), ("plain", tokens(1, 5, 6)), ("r1", tokens(1, 5, 6, 2)))
    ]


# ------------------------------------------------------------------------------------------------------ pooling


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize(
    ("row", "place"),
    [
        ((5, 6, 7), 2),
        ((5, 6, PAD), 1),
        ((5, PAD, PAD), 0),
        ((PAD, 5, PAD), 1),
        ((PAD, PAD, PAD), 0),  # as transformers has it where nothing but padding is there
    ],
)
def test_the_score_is_read_at_the_last_token_or_the_last_that_is_no_padding(live, row, place, per_token):
    numbers = token_scores(live.uid("r1"), tokens(*row))
    for pooling, at in ((1, 2), (2, place), (0, 2)):
        response = reward(live, [{"adapter": "r1"}], pair((), row), pooling=pooling, per_token=per_token)
        assert list(response.results[0].scores) == [numbers[at]]
        assert list(response.results[0].tokens) == [3]


def test_an_appended_end_of_sequence_that_is_the_padding_is_not_read(live):
    request = {"pooling": types_pb2.POOLING_LAST_NOT_PAD, "append_eos": True}
    (result,) = reward(live, [{"adapter": "r1"}], pair((5,), (6,)), **request).results
    assert (list(result.eos_appended), list(result.tokens)) == ([True], [3])
    assert list(result.scores) == [token_scores(live.uid("r1"), tokens(5, 6))[-1]]


def test_an_adapter_declares_its_rule_and_a_request_goes_before_it(live):
    live.on_loop(lambda: bind(live, "r5", AdapterKind.REWARD, pooling=Pooling.LAST_NOT_PAD))
    numbers = token_scores(live.uid("r5"), tokens(5, 6, PAD))
    for ask in (reward, score):
        for pooling, at in ((0, 1), (1, 2), (2, 1)):
            response = ask(live, [{"adapter": "r5"}], pair((5,), (6, PAD)), pooling=pooling)
            assert list(response.results[0].scores) == [numbers[at]]
    facts = live.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name="r5"))
    assert facts.pooling == types_pb2.POOLING_LAST_NOT_PAD
    assert live.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name="p1")).pooling == 0
    refusal = refused(reward, live, [{"adapter": "r5"}], pooling=7)
    assert (refusal.reason, refusal.field) == ("OUT_OF_RANGE", "pooling")
    assert "last_token or last_not_pad" in refusal.message


def test_without_a_padding_token_the_last_token_is_read():
    with Live() as live:
        live.on_loop(bind, live, "r1", AdapterKind.REWARD)
        (result,) = reward(live, [], pair((5,), (6, 2)), pooling=types_pb2.POOLING_LAST_NOT_PAD).results
        assert list(result.scores) == [token_scores(live.uid("r1"), tokens(5, 6, 2))[-1]]


# ------------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize(
    ("more", "field"), [({"append_eos": False}, "append_eos"), ({"pooling": types_pb2.POOLING_LAST_TOKEN}, "pooling")]
)
def test_only_a_reward_declares_how_it_reads(tmp_path, more, field):
    from onebase.server.config import EngineConfig, ServerConfig

    config = ServerConfig(engine=EngineConfig(model="fake"), port=0, drain_seconds=5, roots=(tmp_path,))
    with Live(config) as live:
        request = {"name": "x", "path": "x", **more}
        refusal = refused(live.adapters.LoadAdapter, adapters_pb2.LoadAdapterRequest(kind=1, **request))
        assert (refusal.reason, refusal.field) == ("UNUSED_FIELD", field)
        loaded = live.adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(kind=2, **request))
        assert loaded.HasField("append_eos") == (field == "append_eos")
        assert loaded.pooling == types_pb2.POOLING_LAST_TOKEN
