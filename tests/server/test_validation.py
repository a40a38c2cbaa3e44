"""Whatever a request says wrong is refused with the exact field, before the worker sees anything."""

from __future__ import annotations

import math

import grpc
import pytest
from server.harness import floats, ids, mask, pair, refused, text_of, tokens_of

from onebase.v1 import (
    adapters_pb2,
    inference_pb2,
    sessions_pb2,
    training_pb2,
    types_pb2,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NAN, INF = math.nan, math.inf
GOOD = pair((1, 2), (3, 4))


def check(live, call, request, reason, field, code=INVALID, told=""):
    submitted = len(live.worker.submitted)
    refusal = refused(call, request)
    assert (refusal.code, refusal.reason, refusal.field) == (code, reason, field), refusal
    assert told in refusal.message
    assert len(live.worker.submitted) == submitted


SEQUENCES = [
    ([], "REQUIRED", "sequences", ""),
    ([GOOD, types_pb2.Sequence()], "REQUIRED", "sequences[1].prompt", "give text, tokens or a chat"),
    ([pair((1,), None)], "REQUIRED", "sequences[0].completion", "give text, tokens or a chat"),
    ([pair((), (1,))], "EMPTY_PROMPT", "sequences[0].prompt", "at least one"),
    ([pair((1,), ())], "EMPTY_COMPLETION", "sequences[0].completion.tokens", ""),
    ([pair("a", " ")], "EMPTY_COMPLETION", "sequences[0].completion.text", ""),
    ([GOOD, GOOD, GOOD, pair((1,), (3, -1))], "BAD_TOKEN_ID", "sequences[3].completion.tokens", "id -1 at index 1"),
    ([pair((1, 1000), (3,))], "BAD_TOKEN_ID", "sequences[0].prompt.tokens", "id 1000 at index 1"),
    ([pair("a #1000", (3,))], "BAD_TOKEN_ID", "sequences[0].prompt.text", "id 1000 at index 2"),
    ([pair((1,) * 60, (3,) * 5)], "CONTEXT_TOO_LONG", "sequences[0]", "65 tokens"),
    ([pair("a" * 6401, (3,))], "CONTEXT_TOO_LONG", "sequences[0].prompt.text", "6401 characters"),
    ([GOOD] * 1025, "LIMIT_EXCEEDED", "sequences", "1025"),
]


@pytest.mark.parametrize(("sequences", "reason", "field", "told"), SEQUENCES, ids=lambda case: str(case)[:40])
@pytest.mark.parametrize("method", ["Logprob", "ReferenceLogprob", "Score"])
def test_sequences(live, session, method, sequences, reason, field, told):
    request = {
        "Logprob": inference_pb2.LogprobRequest(session_id=session, sequences=sequences),
        "ReferenceLogprob": inference_pb2.ReferenceLogprobRequest(session_id=session, sequences=sequences),
        "Score": inference_pb2.ScoreRequest(session_id=session, sequences=sequences, rewards=[{"adapter": "r1"}]),
    }[method]
    check(live, getattr(live.inference, method), request, reason, field, told=told)


@pytest.mark.parametrize(
    ("sequences", "reason", "field"),
    [
        ([], "REQUIRED", "sequences"),
        ([pair("a", None)], "REQUIRED", "sequences[0].completion"),
        ([pair("a", "")], "EMPTY_COMPLETION", "sequences[0].completion.text"),
        ([pair(None, ())], "EMPTY_COMPLETION", "sequences[0].completion.tokens"),
        ([GOOD, pair((-5,), (1,))], "BAD_TOKEN_ID", "sequences[1].prompt.tokens"),
        ([pair(None, (5,) * 65)], "CONTEXT_TOO_LONG", "sequences[0]"),
        ([pair("a", "b " * 62)], "CONTEXT_TOO_LONG", "sequences[0]"),  # 64 tokens, and the end-of-sequence token
    ],
)
def test_sequences_of_rewards(live, sequences, reason, field):
    request = inference_pb2.RewardRequest(rewards=[{"adapter": "r1"}], sequences=sequences)
    check(live, live.inference.Reward, request, reason, field)


def test_total_tokens_are_limited(live):
    limit = live.config.limits.max_tokens_per_request
    object.__setattr__(live.config.limits, "max_tokens_per_request", 7)
    try:
        sequences = [GOOD, GOOD]
        request = inference_pb2.LogprobRequest(adapter="p1", sequences=sequences)
        check(live, live.inference.Logprob, request, "LIMIT_EXCEEDED", "sequences", told="8 tokens")
        object.__setattr__(live.config.limits, "max_tokens_per_request", 8)
        live.inference.Logprob(request)
    finally:
        object.__setattr__(live.config.limits, "max_tokens_per_request", limit)


SAMPLING = [
    ({}, "OUT_OF_RANGE", "max_new_tokens"),
    ({"max_new_tokens": 0}, "OUT_OF_RANGE", "max_new_tokens"),
    ({"max_new_tokens": -1}, "OUT_OF_RANGE", "max_new_tokens"),
    ({"max_new_tokens": 2**31 - 1}, "OUT_OF_RANGE", "max_new_tokens"),
    ({"max_new_tokens": 63}, "CONTEXT_TOO_LONG", "max_new_tokens"),
    ({"n": -1}, "OUT_OF_RANGE", "n"),
    ({"temperature": -0.1}, "OUT_OF_RANGE", "temperature"),
    ({"temperature": 1e-9}, "OUT_OF_RANGE", "temperature"),
    ({"temperature": NAN}, "NOT_FINITE", "temperature"),
    ({"temperature": INF}, "NOT_FINITE", "temperature"),
    ({"top_k": -1}, "OUT_OF_RANGE", "top_k"),
    ({"top_p": 0.0}, "OUT_OF_RANGE", "top_p"),
    ({"top_p": 1.01}, "OUT_OF_RANGE", "top_p"),
    ({"top_p": NAN}, "NOT_FINITE", "top_p"),
    ({"min_p": 1.0}, "OUT_OF_RANGE", "min_p"),
    ({"min_p": -0.5}, "OUT_OF_RANGE", "min_p"),
    ({"min_p": NAN}, "NOT_FINITE", "min_p"),
    ({"stop": ["a", ""]}, "REQUIRED", "stop[1]"),
    ({"stop": ["a" * 2000]}, "OUT_OF_RANGE", "stop[0]"),
    ({"stop": ["a"] * 65}, "OUT_OF_RANGE", "stop"),
    ({"stop_token_ids": [5, 1000]}, "BAD_TOKEN_ID", "stop_token_ids[1]"),
    ({"stop_token_ids": [-1]}, "BAD_TOKEN_ID", "stop_token_ids[0]"),
    ({"min_new_tokens": 5}, "OUT_OF_RANGE", "min_new_tokens"),
    ({"min_new_tokens": -1}, "OUT_OF_RANGE", "min_new_tokens"),
]


@pytest.mark.parametrize(("settings", "reason", "field"), SAMPLING, ids=lambda case: str(case)[:40])
def test_sampling(live, settings, reason, field):
    given = {"max_new_tokens": 4, **settings} if settings else {}
    request = inference_pb2.GenerateRequest(
        adapter="p1", prompts=[tokens_of(1, 2)], sampling=inference_pb2.SamplingParams(**given)
    )
    check(live, live.inference.Generate, request, reason, f"sampling.{field}")


def test_prompts(live):
    def request(prompts, n=1):
        return inference_pb2.GenerateRequest(
            adapter="p1", prompts=prompts, sampling=inference_pb2.SamplingParams(max_new_tokens=4, n=n)
        )

    for prompts, n, reason, field in (
        ([], 1, "REQUIRED", "prompts"),
        ([tokens_of(1), types_pb2.Content()], 1, "REQUIRED", "prompts[1]"),
        ([tokens_of()], 1, "EMPTY_PROMPT", "prompts[0]"),
        ([tokens_of(1), tokens_of(1000)], 1, "BAD_TOKEN_ID", "prompts[1].tokens"),
        ([text_of("#1000")], 1, "BAD_TOKEN_ID", "prompts[0].text"),
        ([tokens_of(1)] * 2, 513, "LIMIT_EXCEEDED", "prompts"),
        ([tokens_of(1), tokens_of(*[1] * 61)], 1, "CONTEXT_TOO_LONG", "sampling.max_new_tokens"),
    ):
        check(live, live.inference.Generate, request(prompts, n), reason, field)
    assert list(live.inference.Generate(request([tokens_of(*[1] * 60)])))  # just fits


@pytest.mark.parametrize("name", ["../x", "a\0", "é", "x" * 65])
def test_names(live, session, name):
    one = [GOOD]
    for call, request, field in (
        (live.inference.Logprob, inference_pb2.LogprobRequest(adapter=name, sequences=one), "adapter"),
        (
            live.inference.ReferenceLogprob,
            inference_pb2.ReferenceLogprobRequest(reference=name, sequences=one),
            "reference",
        ),
        (
            live.inference.Reward,
            inference_pb2.RewardRequest(rewards=[{"adapter": "r1"}, {"adapter": name}], sequences=one),
            "rewards[1].adapter",
        ),
        (live.inference.Score, inference_pb2.ScoreRequest(ppo_adapter_name=name, sequences=one), "ppo_adapter_name"),
        (
            live.inference.Score,
            inference_pb2.ScoreRequest(ppo_adapter_name="p1", rewards=[{"adapter": name}], sequences=one),
            "rewards[0].adapter",
        ),
        (live.adapters.GetAdapter, adapters_pb2.GetAdapterRequest(name=name), "name"),
        (live.adapters.DeleteAdapter, adapters_pb2.DeleteAdapterRequest(name=name), "name"),
        (live.adapters.CreateAdapter, adapters_pb2.CreateAdapterRequest(name=name), "name"),
        (live.adapters.SaveAdapter, adapters_pb2.SaveAdapterRequest(name=name, path="x"), "name"),
        (live.sessions.OpenSession, sessions_pb2.OpenSessionRequest(ppo_adapter_name=name), "ppo_adapter_name"),
    ):
        check(live, call, request, "BAD_ADAPTER_NAME", field)


def train_request(session, **changes):
    sequence = {
        "sequence": GOOD,
        "old_logprobs": floats(-1, -2),
        "old_values": floats(0, 1),
        "advantages": floats(1, -1),
        "returns": floats(0.5, 0.5),
        "mask": mask(1, 0),
    }
    request = {"session_id": session, "sequences": [sequence], "ppo": training_pb2.PpoLoss()}
    for path, value in changes.items():
        place = sequence if path in sequence else request
        if value is None:
            del place[path]
        else:
            place[path] = value
    request["sequences"] = [training_pb2.TrainingSequence(**one) for one in request["sequences"]]
    return training_pb2.ForwardBackwardRequest(**request)


TRAINING = [
    ({"sequences": []}, "REQUIRED", "sequences"),
    ({"ppo": None}, "REQUIRED", "loss"),
    ({"sequence": pair((1,), (5, 1000))}, "BAD_TOKEN_ID", "sequences[0].sequence.completion.tokens"),
    ({"sequence": pair((1,), ())}, "EMPTY_COMPLETION", "sequences[0].sequence.completion.tokens"),
    ({"sequence": pair((), (5,))}, "EMPTY_PROMPT", "sequences[0].sequence.prompt"),
    ({"old_logprobs": None}, "REQUIRED", "sequences[0].old_logprobs"),
    ({"old_values": None}, "REQUIRED", "sequences[0].old_values"),
    ({"advantages": None}, "REQUIRED", "sequences[0].advantages"),
    ({"returns": None}, "REQUIRED", "sequences[0].returns"),
    ({"old_logprobs": floats(1)}, "LENGTH_MISMATCH", "sequences[0].old_logprobs"),
    ({"returns": floats(1, 2, 3)}, "LENGTH_MISMATCH", "sequences[0].returns"),
    ({"advantages": floats(1, NAN)}, "NOT_FINITE", "sequences[0].advantages"),
    ({"old_values": floats(INF, 1)}, "NOT_FINITE", "sequences[0].old_values"),
    ({"old_logprobs": floats(-INF, 1)}, "NOT_FINITE", "sequences[0].old_logprobs"),
    ({"old_logprobs": ids(1, 2)}, "BAD_TENSOR", "sequences[0].old_logprobs"),
    ({"mask": mask(0, 0)}, "EMPTY_MASK", "sequences[0].mask"),
    ({"mask": mask(1)}, "LENGTH_MISMATCH", "sequences[0].mask"),
    ({"mask": floats(1, 1)}, "BAD_TENSOR", "sequences[0].mask"),
    ({"denominator": 0.0}, "OUT_OF_RANGE", "denominator"),
    ({"denominator": NAN}, "NOT_FINITE", "denominator"),
    ({"expected_version": -1}, "OUT_OF_RANGE", "expected_version"),
    ({"ppo": {"cliprange": 0.0}}, "OUT_OF_RANGE", "ppo.cliprange"),
    ({"ppo": {"cliprange_value": -0.1}}, "OUT_OF_RANGE", "ppo.cliprange_value"),
    ({"ppo": {"vf_coef": -0.1}}, "OUT_OF_RANGE", "ppo.vf_coef"),
    ({"ppo": {"vf_coef": INF}}, "NOT_FINITE", "ppo.vf_coef"),
    ({"ppo": {"ratio_threshold": 0.0}}, "OUT_OF_RANGE", "ppo.ratio_threshold"),
]


@pytest.mark.parametrize(("changes", "reason", "field"), TRAINING, ids=lambda case: str(case)[:40])
def test_training(live, session, changes, reason, field):
    check(live, live.training.ForwardBackward, train_request(session, **changes), reason, field)


def test_training_needs_a_session(live):
    check(live, live.training.ForwardBackward, train_request("", adapter="p1"), "REQUIRED", "session_id")
    request = training_pb2.OptimStepRequest(adapter="p1", adamw={"learning_rate": 1e-3})
    check(live, live.training.OptimStep, request, "REQUIRED", "session_id")


@pytest.mark.parametrize(
    ("settings", "reason", "field"),
    [
        ({}, "REQUIRED", "adamw"),
        ({"adamw": {"learning_rate": -1e-3}}, "OUT_OF_RANGE", "adamw.learning_rate"),
        ({"adamw": {"learning_rate": NAN}}, "NOT_FINITE", "adamw.learning_rate"),
        ({"adamw": {"learning_rate": 1e5}}, "OUT_OF_RANGE", "adamw.learning_rate"),
        ({"adamw": {"learning_rate": 1e25, "eps": 1e4}}, "OUT_OF_RANGE", "adamw.learning_rate"),
        ({"adamw": {"learning_rate": 1, "beta1": 1.0}}, "OUT_OF_RANGE", "adamw.beta1"),
        ({"adamw": {"learning_rate": 1, "beta2": -0.1}}, "OUT_OF_RANGE", "adamw.beta2"),
        ({"adamw": {"learning_rate": 1, "beta2": NAN}}, "NOT_FINITE", "adamw.beta2"),
        ({"adamw": {"learning_rate": 1, "eps": 0.0}}, "OUT_OF_RANGE", "adamw.eps"),
        ({"adamw": {"learning_rate": 1, "weight_decay": -1}}, "OUT_OF_RANGE", "adamw.weight_decay"),
        ({"adamw": {"learning_rate": 1}, "max_grad_norm": -1.0}, "OUT_OF_RANGE", "max_grad_norm"),
        ({"adamw": {"learning_rate": 1}, "max_grad_norm": INF}, "NOT_FINITE", "max_grad_norm"),
        ({"adamw": {"learning_rate": 1}, "expected_version": -2}, "OUT_OF_RANGE", "expected_version"),
    ],
)
def test_steps(live, session, settings, reason, field):
    check(live, live.training.OptimStep, training_pb2.OptimStepRequest(session_id=session, **settings), reason, field)


LORA = {"rank": 8, "alpha": 16.0, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("lora", "reason", "field", "code"),
    [
        ({"rank": 0}, "OUT_OF_RANGE", "lora.rank", INVALID),
        ({"rank": -4}, "OUT_OF_RANGE", "lora.rank", INVALID),
        ({"rank": 513}, "LIMIT_EXCEEDED", "lora.rank", grpc.StatusCode.RESOURCE_EXHAUSTED),
        ({"alpha": 0.0}, "OUT_OF_RANGE", "lora.alpha", INVALID),
        ({"alpha": NAN}, "NOT_FINITE", "lora.alpha", INVALID),
        ({"target_modules": []}, "REQUIRED", "lora.target_modules", INVALID),
        ({"target_modules": ["q_proj", ".*"]}, "BAD_MODULE_NAME", "lora.target_modules[1]", INVALID),
        ({"target_modules": ["q"] * 5000}, "OUT_OF_RANGE", "lora.target_modules", INVALID),
        ({"rank_pattern": {"q_proj": 0}}, "OUT_OF_RANGE", "lora.rank_pattern[q_proj]", INVALID),
        ({"rank_pattern": {"q": 9999}}, "LIMIT_EXCEEDED", "lora.rank_pattern[q]", grpc.StatusCode.RESOURCE_EXHAUSTED),
        ({"rank_pattern": {"(?=a)(a+)+$": 4}}, "BAD_PATTERN", "lora.rank_pattern", INVALID),
        ({"alpha_pattern": {"(q": 4.0}}, "BAD_PATTERN", "lora.alpha_pattern", INVALID),
        ({"alpha_pattern": {"q": INF}}, "NOT_FINITE", "lora.alpha_pattern[q]", INVALID),
    ],
)
def test_lora_specs(live, lora, reason, field, code):
    request = adapters_pb2.CreateAdapterRequest(name="new", lora=types_pb2.LoraSpec(**{**LORA, **lora}))
    check(live, live.adapters.CreateAdapter, request, reason, field, code)


def test_a_patterned_spec_of_the_largest_rank_is_taken_as_it_is(live):
    spec = types_pb2.LoraSpec(
        rank=512,
        alpha=1e-3,
        target_modules=["model.layers.0.self_attn.q_proj"],
        use_rslora=True,
        rank_pattern={r"^model\.layers\.[01]\.(q|k)_proj$": 4},
        alpha_pattern={"q_proj": 2.5},
    )
    made = live.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(name="new", lora=spec, seed=-7))
    assert made.lora == spec
    assert live.worker.executed[-1].seed == -7


def test_the_reserved_name_and_unset_kinds(live):
    check(live, live.adapters.CreateAdapter, adapters_pb2.CreateAdapterRequest(name="base"), "BAD_ADAPTER_NAME", "name")
    check(live, live.adapters.LoadAdapter, adapters_pb2.LoadAdapterRequest(name="x", path="y"), "REQUIRED", "kind")
    request = adapters_pb2.LoadAdapterRequest(name="x", path="y", kind=17)
    check(live, live.adapters.LoadAdapter, request, "OUT_OF_RANGE", "kind")
    request = adapters_pb2.LoadAdapterRequest(name="x", path="y", kind=types_pb2.ADAPTER_KIND_REWARD, value_head=True)
    check(live, live.adapters.LoadAdapter, request, "UNUSED_FIELD", "value_head")
    check(live, live.adapters.ListAdapters, adapters_pb2.ListAdaptersRequest(kind=9), "OUT_OF_RANGE", "kind")


def test_scores_outputs_weights_and_versions(live, session):
    def request(**changes):
        return inference_pb2.ScoreRequest(session_id=session, sequences=[GOOD], **changes)

    score = live.inference.Score
    check(live, score, request(outputs=[1, 0]), "OUT_OF_RANGE", "outputs[1]")
    check(live, score, request(outputs=[77]), "OUT_OF_RANGE", "outputs[0]")
    check(live, score, request(rewards=[{"adapter": "r1", "weight": NAN}]), "NOT_FINITE", "rewards[0].weight")
    check(live, score, request(rewards=[{"adapter": "r1"}, {"adapter": "r1"}]), "DUPLICATE_TERM", "rewards[1].adapter")
    check(live, score, request(rewards=[{"adapter": "r1"}], outputs=[1]), "UNUSED_FIELD", "rewards")
    check(live, score, request(adapter_version=0, outputs=[2]), "UNUSED_FIELD", "adapter_version")
    check(live, score, request(adapter_version=-1, rewards=[{"adapter": "r1"}]), "OUT_OF_RANGE", "adapter_version")


@pytest.mark.parametrize(
    ("settings", "reason", "field"),
    [
        ({"ttl_seconds": 0.5}, "OUT_OF_RANGE", "ttl_seconds"),
        ({"ttl_seconds": 3601}, "OUT_OF_RANGE", "ttl_seconds"),
        ({"ttl_seconds": NAN}, "NOT_FINITE", "ttl_seconds"),
        ({"label": "x" * 101}, "BAD_LABEL", "label"),
        ({"label": "a\nb"}, "BAD_LABEL", "label"),
    ],
)
def test_sessions(live, settings, reason, field):
    check(live, live.sessions.OpenSession, sessions_pb2.OpenSessionRequest(**settings), reason, field)
    assert live.on_loop(live.edge.sessions.live) == []


@pytest.mark.parametrize("request_id", ["x" * 129, "a\tb"])
def test_request_ids(live, session, request_id):
    request = adapters_pb2.CreateAdapterRequest(name="new", request_id=request_id)
    check(live, live.adapters.CreateAdapter, request, "BAD_REQUEST_ID", "request_id")
