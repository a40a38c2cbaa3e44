import numpy as np
import pytest
from client.wire import floats, ids, version

from onebase.client import types as t
from onebase.client.codec import inference
from onebase.client.errors import InternalError
from onebase.v1 import inference_pb2 as pb

SEQUENCE = t.Sequence("p", "c")


def generate(sampling=t.SamplingParams()):  # noqa: B008
    return inference.generate(
        "p", adapter="a", sampling=sampling, logprobs=False, values=False, adapter_version=None, stream_tokens=False
    )


def score(**changes):
    settings = {"rewards": None, "reference": "base", "outputs": None, "append_eos": None}
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
    call = inference.logprob(SEQUENCE, adapter="a", entropy=True, values=True, adapter_version=None)
    response = pb.LogprobResponse(
        results=[
            pb.LogprobResult(
                logprobs=floats(-1), entropy=floats(2), values=floats(3), completion_tokens=ids(4)
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
    assert full.adapter == bare.adapter == t.AdapterVersion("a", 3)


# ---------------------------------------------------------------------------------------------------- rewards


def test_rewards_are_read_by_adapter():
    call = inference.reward(SEQUENCE, ["x", "y"], append_eos=None, per_token=True)
    response = pb.RewardResponse(
        results=[
            pb.RewardResult(
                scores=[0.5, -0.25], token_scores=floats(1, 2, 3, 4, shape=(2, 2)), tokens=2, eos_appended=True
            )
        ],
        adapters=[version("x", 1), version("y", 2)],
        ppo_adapter_name="policy_1",
    )

    (reward,), active = call.read(response)

    assert active == "policy_1"
    assert reward.scores == {"x": 0.5, "y": -0.25}
    assert {name: scores.tolist() for name, scores in reward.token_scores.items()} == {"x": [1, 2], "y": [3, 4]}
    assert (reward.tokens, reward.eos_appended, reward.versions) == (2, True, {"x": 1, "y": 2})
    with pytest.raises(ValueError, match="2 reward adapters answered"):
        _ = reward.score


def test_token_scores_are_none_unless_asked_for():
    call = inference.reward(SEQUENCE, None, append_eos=None, per_token=False)

    (reward,), _ = call.read(pb.RewardResponse(results=[pb.RewardResult(scores=[2.0])], adapters=[version("x")]))

    assert (reward.token_scores, reward.score) == (None, 2.0)


def test_reward_adapters_are_one_several_or_the_only_one():
    def asked(adapters):
        return list(inference.reward(SEQUENCE, adapters, append_eos=None, per_token=False).request.adapters)

    assert asked("helpful") == ["helpful"]
    assert asked(["a", "b"]) == ["a", "b"]
    assert asked(None) == []
    with pytest.raises(ValueError, match="adapters is empty"):
        asked([])


def test_append_eos_has_three_states():
    def request(append_eos):
        return inference.reward(SEQUENCE, None, append_eos=append_eos, per_token=False).request

    assert not request(None).HasField("append_eos")
    assert request(False).HasField("append_eos")
    assert not request(False).append_eos
    assert request(True).append_eos


# ------------------------------------------------------------------------------------------------------- score


@pytest.mark.parametrize(
    ("rewards", "terms"),
    [
        (None, []),
        ("x", [("x", None)]),
        (["x", "y"], [("x", None), ("y", None)]),
        ({"x": -1.0, "y": 0.0}, [("x", -1.0), ("y", 0.0)]),
    ],
)
def test_rewards_are_named_with_or_without_weights(rewards, terms):
    request = score(rewards=rewards).request

    assert [(r.adapter, r.weight if r.HasField("weight") else None) for r in request.rewards] == terms


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
                scores=[1.0, 2.0], reward=-1.5, completion_tokens=ids(5), eos_appended=True,
            )
        ],
        policy=version("policy_1", 6),
        reference=version("base", 0),
        rewards=[version("x"), version("y")],
        ppo_adapter_name="policy_1",
    )  # fmt: skip

    (result,), active = score().read(response)

    arrays = (result.logprobs, result.reference_logprobs, result.values, result.entropy, result.completion_tokens)
    assert [array.tolist() for array in arrays] == [[-1], [-2], [3], [4], [5]]
    assert (result.scores, result.reward, result.eos_appended) == ({"x": 1.0, "y": 2.0}, -1.5, True)
    assert (result.policy, result.reference) == (t.AdapterVersion("policy_1", 6), t.AdapterVersion("base", 0))
    assert active == "policy_1"


def test_what_was_not_scored_is_none():
    (result,), active = score(outputs=["logprobs"]).read(
        pb.ScoreResponse(results=[pb.ScoreResult(logprobs=floats(-1))], rewards=[])
    )

    assert (result.reference_logprobs, result.values, result.entropy, result.scores) == (None, None, None, {})
    assert active == ""
