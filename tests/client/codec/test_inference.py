import numpy as np
import pytest
from client.wire import floats, ids, version

from onebase.client import types as t
from onebase.client.codec import inference
from onebase.client.errors import InternalError
from onebase.v1 import inference_pb2 as pb
from onebase.v1 import types_pb2

SEQUENCE = t.Sequence("p", "c")


def generate(sampling=t.SamplingParams()):  # noqa: B008
    return inference.generate(
        "p", adapter="a", sampling=sampling, logprobs=False, values=False, adapter_version=None, stream_tokens=False
    )


def score(**changes):
    settings = {
        "rewards": None,
        "reference": "base",
        "outputs": None,
        "critic": "",
        "append_eos": None,
        "pooling": None,
    }
    return inference.score(
        SEQUENCE, **{**settings, "ppo_adapter_name": "", "adapter_version": None, "session_id": "", **changes}
    )


def chunk(prompt, completion, tokens, reason=None, text="", logprobs=None):
    return t.CompletionChunk(
        prompt_index=prompt,
        completion_index=completion,
        text=text,
        tokens=np.array(tokens, np.int32),
        logprobs=logprobs,
        values=None,
        finish_reason=reason,
        adapter=t.AdapterVersion("a", 1),
        seed=5,
        prompt_tokens=2,
    )


# ---------------------------------------------------------------------------------------------------- sampling


def test_greedy_and_other_zeros_are_sent_and_not_lost_as_unset():
    sampling = generate(t.SamplingParams(temperature=0.0, top_p=0.0, seed=0)).request.sampling

    assert all(sampling.HasField(name) for name in ("temperature", "top_p", "seed"))
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.0, 0.0, 0)


def test_no_seed_and_no_version_are_left_unset():
    request = generate().request

    assert not request.sampling.HasField("seed")
    assert not request.HasField("adapter_version")


def test_sampling_is_sent_field_by_field():
    given = t.SamplingParams(9, 2, 0.5, 3, 0.25, 0.125, ("x", "y"), (4, 5), 6, True, 1)

    sent = generate(given).request.sampling

    for name, value in vars(given).items():
        assert (tuple(getattr(sent, name)) if isinstance(value, tuple) else getattr(sent, name)) == value, name


def test_a_single_stop_text_is_not_taken_apart():
    assert list(generate(t.SamplingParams(stop="END")).request.sampling.stop) == ["END"]


@pytest.mark.parametrize(
    ("sampling", "error", "field"),
    [
        (t.SamplingParams(max_new_tokens=1.5), TypeError, "max_new_tokens=1.5"),
        (t.SamplingParams(seed=2**70), ValueError, "seed="),
        (t.SamplingParams(temperature="hot"), TypeError, "temperature='hot'"),
        (t.SamplingParams(stop=(1,)), TypeError, r"stop\[0\]"),
        (t.SamplingParams(stop_token_ids=(2**31,)), ValueError, "stop_token_ids="),
    ],
)
def test_a_parameter_that_cannot_be_encoded_is_named(sampling, error, field):
    with pytest.raises(error, match=field):
        generate(sampling)


# ------------------------------------------------------------------------------------------------- completions


def test_a_chunk_is_read():
    message = pb.GenerateResponse(
        prompt_index=1,
        completion_index=2,
        text="ab",
        tokens=ids(3, 4),
        logprobs=floats(-1, -2),
        values=floats(0.5, 0.25),
        finish_reason=pb.FINISH_REASON_STOP_STRING,
        adapter=version("policy_1", 9),
        seed=11,
        prompt_tokens=12,
    )

    read = generate().read(message)

    assert (read.prompt_index, read.completion_index, read.text, read.seed, read.prompt_tokens) == (1, 2, "ab", 11, 12)
    assert (read.tokens.tolist(), read.logprobs.tolist(), read.values.tolist()) == ([3, 4], [-1, -2], [0.5, 0.25])
    assert (read.finish_reason, read.adapter) == ("stop_string", t.AdapterVersion("policy_1", 9))


def test_a_chunk_without_tokens_or_end_is_read():
    read = generate().read(pb.GenerateResponse(text="x"))

    assert (read.tokens.shape, read.tokens.dtype) == ((0,), np.int32)
    assert (read.logprobs, read.values, read.finish_reason) == (None, None, None)


@pytest.mark.parametrize("reason", list(inference.FINISH_REASONS))
def test_every_finish_reason_has_its_name(reason):
    number = pb.FinishReason.Value(f"FINISH_REASON_{reason.upper()}")

    assert generate().read(pb.GenerateResponse(finish_reason=number)).finish_reason == reason
    assert len(inference.FINISH_REASONS) == len(pb.FinishReason.items()) - 1


def test_chunks_that_interleave_are_joined_prompt_by_prompt():
    joined = inference.join_chunks(
        [
            chunk(1, 0, [10], text="c"),
            chunk(0, 1, [5], "eos", text="b"),
            chunk(0, 0, [1, 2], text="a", logprobs=np.array([-1, -2], np.float32)),
            chunk(1, 0, [11], "length", text="d"),
            chunk(0, 0, [], text="!"),
            chunk(0, 0, [3], "stop_token", logprobs=np.array([-3], np.float32)),
        ]
    )

    told = [(c.prompt_index, c.completion_index, c.text, c.tokens.tolist(), c.finish_reason) for c in joined]
    assert told == [
        (0, 0, "a!", [1, 2, 3], "stop_token"),
        (0, 1, "b", [5], "eos"),
        (1, 0, "cd", [10, 11], "length"),
    ]
    assert joined[0].logprobs.tolist() == [-1, -2, -3]
    assert joined[1].logprobs is None
    assert (joined[0].seed, joined[0].prompt_tokens, joined[0].adapter) == (5, 2, t.AdapterVersion("a", 1))


def test_a_stream_that_ends_before_a_completion_does_is_told():
    with pytest.raises(InternalError, match="before completion 1 of prompt 0"):
        inference.join_chunks([chunk(0, 0, [1], "eos"), chunk(0, 1, [1])])


# --------------------------------------------------------------------------------------------------- logprobs


def test_logprobs_are_read():
    call = inference.logprob(SEQUENCE, adapter="a", entropy=True, values=True, logits=True, adapter_version=None)
    response = pb.LogprobResponse(
        results=[
            pb.LogprobResult(
                logprobs=floats(-1), entropy=floats(2), values=floats(3), completion_tokens=ids(4),
                logits=floats(7, 8, shape=(1, 2)),
            ),
            pb.LogprobResult(logprobs=floats(-5, -6)),
        ],
        adapter=version("a", 3),
    )  # fmt: skip

    full, bare = call.read(response)

    assert [a.tolist() for a in (full.logprobs, full.entropy, full.values, full.completion_tokens)] == [
        [-1], [2], [3], [4],
    ]  # fmt: skip
    assert (bare.logprobs.tolist(), bare.entropy, bare.values, bare.completion_tokens) == ([-5, -6], None, None, None)
    assert (full.logits.tolist(), bare.logits) == ([[7, 8]], None)
    assert full.adapter == bare.adapter == t.AdapterVersion("a", 3)


# ---------------------------------------------------------------------------------------------------- rewards


def reward(rewards=None, **changes):
    return inference.reward(SEQUENCE, rewards, **{"append_eos": None, "pooling": None, "per_token": False, **changes})


def test_rewards_are_read_by_term():
    call = reward(["x", t.RewardTerm("y", label=1), "y[0]"], per_token=True)
    response = pb.RewardResponse(
        results=[
            pb.RewardResult(
                scores=[0.5, -0.25, 1.5],
                token_scores=[floats(1, 2), floats(3, 4, 5), floats(6, 7, 8)],
                tokens=[2, 3, 3],
                eos_appended=[False, True, True],
                reward=1.75,
            )
        ],
        rewards=[version("x", 1), version("y", 2), version("y", 2)],
        ppo_adapter_name="policy_1",
    )

    (found,), active = call.read(response)

    assert active == "policy_1"
    assert found.scores == {"x": 0.5, "y[1]": -0.25, "y[0]": 1.5}
    assert {name: scores.tolist() for name, scores in found.token_scores.items()} == {
        "x": [1, 2],
        "y[1]": [3, 4, 5],
        "y[0]": [6, 7, 8],
    }
    assert found.tokens == {"x": 2, "y[1]": 3, "y[0]": 3}
    assert found.eos_appended == {"x": False, "y[1]": True, "y[0]": True}
    assert (found.versions, found.reward) == ({"x": 1, "y[1]": 2, "y[0]": 2}, 1.75)
    with pytest.raises(ValueError, match="3 reward terms answered"):
        _ = found.score


def test_the_servers_only_reward_is_read_by_its_name_and_token_scores_are_none_unless_asked_for():
    result = pb.RewardResult(scores=[2.0], tokens=[3], eos_appended=[True], reward=2.0)

    (found,), _ = reward().read(pb.RewardResponse(results=[result], rewards=[version("x")]))

    assert (found.token_scores, found.score, found.tokens) == (None, 2.0, {"x": 3})


def test_an_answer_of_too_few_terms_is_an_internal_error():
    result = pb.RewardResult(scores=[2.0], tokens=[3], eos_appended=[True])
    with pytest.raises(InternalError, match="1 numbers for 2 reward terms"):
        reward(["x", "y"]).read(pb.RewardResponse(results=[result], rewards=[version("x")]))


@pytest.mark.parametrize(
    ("rewards", "terms"),
    [
        (None, []),
        ("helpful", [("helpful", 1.0, None)]),
        ("helpful[12]", [("helpful", 1.0, 12)]),
        (["a", "b[0]"], [("a", 1.0, None), ("b", 1.0, 0)]),
        ({"x": -1.0, "y[2]": 0.0}, [("x", -1.0, None), ("y", 0.0, 2)]),
        (t.RewardTerm("x", 0.5, 3), [("x", 0.5, 3)]),
        (["a", t.RewardTerm("a", label=1)], [("a", 1.0, None), ("a", 1.0, 1)]),
        ("odd[x]", [("odd[x]", 1.0, None)]),  # no name at all: the server says so
    ],
)
def test_reward_terms_are_names_weights_and_labels(rewards, terms):
    for request in (reward(rewards).request, score(rewards=rewards).request):
        told = [(r.adapter, r.weight, r.label if r.HasField("label") else None) for r in request.rewards]
        assert told == terms


@pytest.mark.parametrize(
    ("rewards", "error", "message"),
    [
        ([], ValueError, "rewards is empty"),
        ([1], TypeError, r"rewards\[0\] must be a RewardTerm, not int"),
        (5, TypeError, "rewards must be a RewardTerm or several"),
        ([t.RewardTerm("a", label=2**40)], ValueError, r"rewards\[0\]: label="),
        ({"a": "much"}, TypeError, r"rewards\[0\]: weight='much'"),
    ],
)
def test_what_is_no_reward_term_is_named(rewards, error, message):
    with pytest.raises(error, match=message):
        reward(rewards)


def test_pooling_is_named_or_left_to_the_adapters():
    assert reward().request.pooling == types_pb2.POOLING_UNSPECIFIED
    assert reward(pooling="last_not_pad").request.pooling == types_pb2.POOLING_LAST_NOT_PAD
    assert score(pooling="last_token").request.pooling == types_pb2.POOLING_LAST_TOKEN
    with pytest.raises(ValueError, match="pooling must be one of last_token, last_not_pad, not 'mean'"):
        reward(pooling="mean")


def test_append_eos_has_three_states():
    def request(append_eos):
        return reward(append_eos=append_eos).request

    assert not request(None).HasField("append_eos")
    assert request(False).HasField("append_eos")
    assert not request(False).append_eos
    assert request(True).append_eos


# ------------------------------------------------------------------------------------------------------- score


def test_no_rewards_at_all_must_be_said_by_the_outputs():
    with pytest.raises(ValueError, match="rewards is empty"):
        score(rewards={})
    assert list(score(rewards={}, outputs=["values"]).request.rewards) == []


def test_outputs_are_named():
    assert list(score().request.outputs) == []
    asked = score(outputs=("entropy", "logprobs")).request.outputs
    assert list(asked) == [pb.SCORE_OUTPUT_ENTROPY, pb.SCORE_OUTPUT_LOGPROBS]
    with pytest.raises(ValueError, match="outputs is empty"):
        score(outputs=())
    with pytest.raises(ValueError, match=r"outputs must be one of logprobs, .*, not 'reward'"):
        score(outputs=["reward"])


def test_every_output_has_its_name():
    names = {f"SCORE_OUTPUT_{name.upper()}": number for name, number in inference.SCORE_OUTPUTS.items()}

    assert names == {name: number for name, number in pb.ScoreOutput.items() if number}


def test_scores_are_read():
    response = pb.ScoreResponse(
        results=[
            pb.ScoreResult(
                logprobs=floats(-1), reference_logprobs=floats(-2), values=floats(3), entropy=floats(4),
                scores=[1.0, 2.0], reward=-1.5, completion_tokens=ids(5), eos_appended=[True, False],
            )
        ],
        policy=version("policy_1", 6),
        reference=version("base", 0),
        rewards=[version("x"), version("y")],
        ppo_adapter_name="policy_1",
        critic=version("critic_1", 4),
    )  # fmt: skip

    (result,), active = score(critic="critic_1").read(response)

    arrays = (result.logprobs, result.reference_logprobs, result.values, result.entropy, result.completion_tokens)
    assert [array.tolist() for array in arrays] == [[-1], [-2], [3], [4], [5]]
    assert (result.scores, result.reward) == ({"x": 1.0, "y": 2.0}, -1.5)
    assert result.eos_appended == {"x": True, "y": False}
    assert result.critic == t.AdapterVersion("critic_1", 4)
    assert (result.policy, result.reference) == (t.AdapterVersion("policy_1", 6), t.AdapterVersion("base", 0))
    assert active == "policy_1"


def test_what_was_not_scored_is_none():
    (result,), active = score(outputs=["logprobs"]).read(
        pb.ScoreResponse(results=[pb.ScoreResult(logprobs=floats(-1))], rewards=[])
    )

    assert (result.reference_logprobs, result.values, result.entropy, result.critic) == (None, None, None, None)
    assert (result.scores, result.eos_appended) == ({}, {})
    assert active == ""
