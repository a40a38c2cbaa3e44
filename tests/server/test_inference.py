from __future__ import annotations

import grpc
import numpy as np
import pytest
from server.conftest import bind
from server.fakes import FACTS, FakeWorker, entropy, logits, logprobs, token_scores, values
from server.harness import Live, array, pair, refused

from onebase.server.config import EngineConfig, Limits, ServerConfig
from onebase.server.jobs import AdapterKind, ScoreJob, Work
from onebase.v1 import adapters_pb2, inference_pb2

Score = inference_pb2.ScoreRequest
S = inference_pb2


def same(tensor, expected):
    np.testing.assert_array_equal(array(tensor), expected)


def tokens(*ids):
    return np.array(ids, dtype=np.int64)


# ------------------------------------------------------------------------------------------------------ logprob


def test_logprob_of_the_active_adapter_in_the_requests_order(live, session):
    uid = live.uid("p1")
    response = live.inference.Logprob(
        S.LogprobRequest(
            session_id=session,
            sequences=[pair((9, 8), (7, 6, 5)), pair("#4 word", (3,)), pair((1,), "#20 hello")],
            return_entropy=True,
            return_values=True,
        )
    )
    rows = [(tokens(9, 8, 7, 6, 5), 2), (tokens(1, 4, 104, 3), 3), (tokens(1, 20, 105), 1)]
    for result, (row, start) in zip(response.results, rows, strict=True):
        same(result.logprobs, logprobs(uid, row, start))
        same(result.entropy, entropy(uid, row, start))
        same(result.values, values(uid, row, start))
    assert [result.HasField("completion_tokens") for result in response.results] == [False, False, True]
    same(response.results[2].completion_tokens, [20, 105])
    assert (response.adapter.name, response.adapter.version) == ("p1", 0)


def test_what_was_not_asked_for_is_not_there(live):
    response = live.inference.Logprob(S.LogprobRequest(adapter="base", sequences=[pair((9,), (7,))]))
    assert not response.results[0].HasField("entropy")
    assert not response.results[0].HasField("values")
    same(response.results[0].logprobs, logprobs(0, tokens(9, 7), 1))
    assert response.adapter.name == "base"


def test_reference_logprob_is_of_the_base_or_a_frozen_adapter(live):
    sequences = [pair((9,), (7,))]
    for name, uid in (("", 0), ("base", 0), ("ref", live.uid("ref"))):
        response = live.inference.ReferenceLogprob(S.ReferenceLogprobRequest(reference=name, sequences=sequences))
        same(response.results[0].logprobs, logprobs(uid, tokens(9, 7), 1))
        assert response.adapter.name == (name or "base")
    for name in ("p1", "r1"):
        refusal = refused(
            live.inference.ReferenceLogprob, S.ReferenceLogprobRequest(reference=name, sequences=sequences)
        )
        assert (refusal.code, refusal.reason, refusal.field) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "WRONG_ADAPTER_KIND",
            "reference",
        )


def test_a_version_is_passed_on_and_the_bases_is_0(live):
    def ask(adapter, version):
        return S.LogprobRequest(adapter=adapter, adapter_version=version, sequences=[pair((9,), (7,))])

    live.inference.Logprob(ask("p1", 0))
    refusal = refused(live.inference.Logprob, ask("p1", 3))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "VERSION_MISMATCH")
    live.inference.Logprob(ask("base", 0))
    refusal = refused(live.inference.Logprob, ask("base", 3))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "VERSION_MISMATCH")


@pytest.mark.parametrize(
    ("request_", "code", "reason", "field"),
    [
        ({"adapter": "r1"}, grpc.StatusCode.FAILED_PRECONDITION, "WRONG_ADAPTER_KIND", "adapter"),
        ({"adapter": "p2"}, grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND", "adapter"),
        ({}, grpc.StatusCode.INVALID_ARGUMENT, "REQUIRED", "adapter"),
        ({"session_id": "0" * 32, "adapter": "p1"}, grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND", "session_id"),
        (
            {"adapter": "base", "return_values": True},
            grpc.StatusCode.FAILED_PRECONDITION,
            "NO_VALUE_HEAD",
            "return_values",
        ),
        (
            {"adapter": "ref", "return_values": True},
            grpc.StatusCode.FAILED_PRECONDITION,
            "NO_VALUE_HEAD",
            "return_values",
        ),
    ],
)
def test_whom_logprob_does_not_ask(live, request_, code, reason, field):
    refusal = refused(live.inference.Logprob, S.LogprobRequest(sequences=[pair((9,), (7,))], **request_))
    assert (refusal.code, refusal.reason, refusal.field) == (code, reason, field)
    if reason == "ADAPTER_NOT_FOUND":
        assert "there are p1, r1, r2, ref" in refusal.message


def test_logits_are_given_before_each_completion_token_where_they_fit_in_a_message():
    room = (4 * FACTS.vocab_size + 16) * 3 + 2 * 256  # three tokens in two sequences
    limits = Limits(max_message_bytes=room)
    with Live(ServerConfig(engine=EngineConfig(model="fake"), port=0, drain_seconds=5, limits=limits)) as live:
        request = S.LogprobRequest(
            adapter="base", sequences=[pair((9,), (7, 6)), pair((9, 8), (5,))], return_logits=True
        )
        for result, (row, start) in zip(
            live.inference.Logprob(request).results, [(tokens(9, 7, 6), 1), (tokens(9, 8, 5), 2)], strict=True
        ):
            same(result.logits, logits(0, row, start, FACTS.vocab_size))
        request.return_logits = False
        assert not live.inference.Logprob(request).results[0].HasField("logits")

        request.return_logits = True
        request.sequences.append(pair((1,), (2,)))
        refusal = refused(live.inference.Logprob, request)
        assert (refusal.code, refusal.reason, refusal.field) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "LIMIT_EXCEEDED",
            "return_logits",
        )
        assert f"4 completion tokens over {FACTS.vocab_size} ids" in refusal.message
        assert f"a message may have {room}" in refusal.message
        assert len(live.worker.executed) == 2


# ------------------------------------------------------------------------------------------------------- reward


def test_rewards_of_several_adapters_texts_joined_and_ended(live):
    uids = [live.uid("r2"), live.uid("r1")]
    response = live.inference.Reward(
        S.RewardRequest(
            rewards=[{"adapter": "r2"}, {"adapter": "r1", "weight": -0.5}],
            sequences=[pair("#5", "#6"), pair((5,), (6,)), pair((5,), "#6"), pair("#5", (6, 2)), pair("#5", "#3")],
            per_token=True,
        )
    )
    expected = [  # texts get an end where they have none (2 or 3 is one); token ids are left as they are
        (tokens(1, 5, 6, 2), True),
        (tokens(5, 6), False),
        (tokens(5, 6, 2), True),
        (tokens(1, 5, 6, 2), False),
        (tokens(1, 5, 3), False),
    ]
    assert [one.name for one in response.rewards] == ["r2", "r1"]
    for result, (row, appended) in zip(response.results, expected, strict=True):
        scores = [float(token_scores(uid, row)[-1]) for uid in uids]
        assert list(result.scores) == scores
        assert result.reward == scores[0] - 0.5 * scores[1]
        for tensor, uid in zip(result.token_scores, uids, strict=True):
            same(tensor, token_scores(uid, row))
        assert (list(result.tokens), list(result.eos_appended)) == ([len(row)] * 2, [appended] * 2)
    assert response.ppo_adapter_name == ""


@pytest.mark.parametrize(("append", "size"), [(True, 3), (False, 2), (None, 2)])
def test_append_eos_of_token_ids(live, append, size):
    request = S.RewardRequest(rewards=[{"adapter": "r1"}], sequences=[pair((5,), (6,))], append_eos=append)
    result = live.inference.Reward(request).results[0]
    assert (list(result.tokens), list(result.eos_appended)) == ([size], [append is True])
    assert not result.token_scores


def test_a_reward_of_a_completion_without_prompt(live):
    sequences = [pair(None, "#6"), pair(None, (6,)), pair((), (6,))]
    response = live.inference.Reward(S.RewardRequest(rewards=[{"adapter": "r1"}], sequences=sequences))
    assert [row.tokens.tolist() for row in live.worker.executed[-1].rows] == [[6, 2], [6], [6]]
    assert len(response.results) == 3


def test_which_reward_adapter_answers_unnamed(live):
    request = S.RewardRequest(sequences=[pair((5,), (6,))])
    refusal = refused(live.inference.Reward, request)
    assert (refusal.code, refusal.reason, refusal.field) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "AMBIGUOUS_REWARD_ADAPTER",
        "rewards",
    )
    assert "r1, r2" in refusal.message
    live.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="r1"))
    assert live.inference.Reward(request).rewards[0].name == "r2"
    live.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="r2"))
    refusal = refused(live.inference.Reward, request)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_REWARD_ADAPTER")
    refusal = refused(live.inference.Score, Score(ppo_adapter_name="p1", sequences=[pair((5,), (6,))]))
    assert (refusal.code, refusal.reason, refusal.field) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "NO_REWARD_ADAPTER",
        "rewards",
    )


@pytest.mark.parametrize("name", ["p1", "ref", "base"])
def test_only_reward_adapters_reward(live, name):
    refusal = refused(
        live.inference.Reward,
        S.RewardRequest(rewards=[{"adapter": "r1"}, {"adapter": name}], sequences=[pair((5,), (6,))]),
    )
    assert (refusal.code, refusal.reason, refusal.field) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "WRONG_ADAPTER_KIND",
        "rewards[1].adapter",
    )


def test_a_base_without_an_end_token_appends_none_and_says_so_when_asked():
    from dataclasses import replace

    with Live(worker=FakeWorker(facts=replace(FACTS, eos_token_ids=()))) as live:
        live.on_loop(bind, live, "r1", AdapterKind.REWARD)
        request = S.RewardRequest(sequences=[pair("#5", "#6")])
        assert live.inference.Reward(request).results[0].eos_appended == [False]
        request.append_eos = True
        refusal = refused(live.inference.Reward, request)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_EOS_TOKEN")


# -------------------------------------------------------------------------------------------------------- score


def test_score_puts_every_number_where_it_belongs(live, session):
    policy, reference, r1, r2 = (live.uid(name) for name in ("p1", "ref", "r1", "r2"))
    response = live.inference.Score(
        Score(
            session_id=session,
            reference="ref",
            rewards=[{"adapter": "r2", "weight": -1}, {"adapter": "r1", "weight": 0.5}],
            sequences=[pair((9, 8), (7, 6, 5)), pair("#4", "#30 word"), pair((1,), (2,))],
            outputs=[1, 2, 3, 4, 5],
        )
    )
    rows = [(tokens(9, 8, 7, 6, 5), 2), (tokens(1, 4, 30, 104), 2), (tokens(1, 2), 1)]
    rewarded = [rows[0][0], tokens(1, 4, 30, 104, 2), rows[2][0]]
    for result, (row, start), scored in zip(response.results, rows, rewarded, strict=True):
        same(result.logprobs, logprobs(policy, row, start))
        same(result.values, values(policy, row, start))
        same(result.entropy, entropy(policy, row, start))
        same(result.reference_logprobs, logprobs(reference, row, start))
        expected = [float(token_scores(r2, scored)[-1]), float(token_scores(r1, scored)[-1])]
        np.testing.assert_allclose(result.scores, expected)
        assert result.reward == pytest.approx(-expected[0] + 0.5 * expected[1], abs=1e-12)
    assert [list(result.eos_appended) for result in response.results] == [[False] * 2, [True] * 2, [False] * 2]
    assert [result.HasField("completion_tokens") for result in response.results] == [False, True, False]
    same(response.results[1].completion_tokens, [30, 104])
    assert (response.policy.name, response.reference.name) == ("p1", "ref")
    assert [one.name for one in response.rewards] == ["r2", "r1"]
    assert response.ppo_adapter_name == "p1"


@pytest.mark.parametrize(
    ("outputs", "fields", "rows"),
    [
        ([], {"logprobs", "reference_logprobs", "values", "scores", "reward", "eos_appended"}, 3),
        ([1], {"logprobs"}, 1),
        ([2], {"reference_logprobs"}, 1),
        ([3], {"values"}, 1),
        ([4], {"scores", "reward", "eos_appended"}, 1),
        ([5, 2], {"entropy", "reference_logprobs"}, 2),
    ],
)
def test_score_computes_what_is_asked_for_alone(live, outputs, fields, rows):
    live.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="r2"))
    response = live.inference.Score(Score(ppo_adapter_name="p1", sequences=[pair((9,), (7,))], outputs=outputs))
    assert {field.name for field, _ in response.results[0].ListFields()} == fields
    assert len(live.worker.executed[-1].rows) == rows
    assert response.policy.name == "p1"
    assert response.reference.name == "base"
    assert response.ppo_adapter_name == ""


def test_score_asks_the_version_it_is_told_of_the_policy_alone(live, session):
    request = Score(session_id=session, adapter_version=0, rewards=[{"adapter": "r1"}], sequences=[pair((9,), (7,))])
    live.inference.Score(request)
    assert live.worker.executed[-1].versions == {live.uid("p1"): 0}
    request.adapter_version = 4
    assert refused(live.inference.Score, request).reason == "VERSION_MISMATCH"


def test_values_need_a_value_head(live):
    live.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(name="headless"))
    request = Score(ppo_adapter_name="headless", rewards=[{"adapter": "r1"}], sequences=[pair((9,), (7,))])
    refusal = refused(live.inference.Score, request)
    assert (refusal.code, refusal.reason, refusal.field) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "NO_VALUE_HEAD",
        "outputs",
    )
    request.outputs.extend([1, 2, 4])
    assert live.inference.Score(request).results[0].HasField("logprobs")


def test_anonymous_score_names_its_policy(live):
    refusal = refused(live.inference.Score, Score(sequences=[pair((9,), (7,))]))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "ppo_adapter_name")


def test_a_session_without_an_active_adapter_is_told_so(live):
    from onebase.v1 import sessions_pb2

    session_id = live.sessions.OpenSession(sessions_pb2.OpenSessionRequest()).session_id
    request = S.LogprobRequest(session_id=session_id, sequences=[pair((9,), (7,))])
    refusal = refused(live.inference.Logprob, request)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_ACTIVE_ADAPTER")


# ------------------------------------------------------------------------------------------------------- queues


@pytest.mark.parametrize(
    ("count", "length", "work"), [(16, 64, Work.INTERACTIVE), (17, 2, Work.SCORE), (1, 2, Work.INTERACTIVE)]
)
def test_small_work_is_interactive(live, count, length, work):
    sequences = [pair((1,), (5,) * (length - 1))] * count
    live.inference.Reward(S.RewardRequest(rewards=[{"adapter": "r1"}], sequences=sequences))
    assert live.worker.executed[-1].work is work


def test_few_long_rows_are_not_interactive():
    from dataclasses import replace

    with Live(worker=FakeWorker(facts=replace(FACTS, max_context=5000))) as live:
        live.on_loop(bind, live, "r1", AdapterKind.REWARD)
        for length, work in ((4096, Work.INTERACTIVE), (4097, Work.SCORE)):
            live.inference.Reward(S.RewardRequest(sequences=[pair(None, (5,) * length)]))
            assert live.worker.executed[-1].work is work


def test_a_full_queue_says_when_to_come_again(live):
    live.worker.hold(ScoreJob)
    live.worker.room = 1
    request = S.LogprobRequest(adapter="p1", sequences=[pair((9,), (7,))])
    waiting = live.inference.Logprob.future(request)
    live.worker.wait_submitted(ScoreJob)
    refusal = refused(live.inference.Logprob, request)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert 0.05 <= refusal.retry_after <= 60
    wrong = S.LogprobRequest(adapter="p1", sequences=[pair((9,), (10**6,))])
    assert refused(live.inference.Logprob, wrong).reason == "QUEUE_FULL"  # it is not even read
    new = adapters_pb2.CreateAdapterRequest(name="new", lora={"rank": 4, "target_modules": ["all-linear"]})
    assert refused(live.adapters.CreateAdapter, new).reason == "QUEUE_FULL"  # what floods makes no adapters either
    assert len(live.worker.refusals) == 3  # which are paid for with turns
    live.worker.release()
    assert waiting.result(timeout=20)


def test_jobs_stand_in_their_sessions_queue_but_never_under_its_id(live, session):
    request = S.LogprobRequest(session_id=session, sequences=[pair((9,), (7,))])
    live.inference.Logprob(request)
    request.session_id, request.adapter = "", "p1"
    live.inference.Logprob(request)
    named, anonymous = (job.session for job in live.worker.executed[-2:])
    assert named
    assert session not in named
    assert anonymous == ""
