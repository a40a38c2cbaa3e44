"""Conversations in requests: what becomes of them, and what is wrong with one is named."""

from __future__ import annotations

from dataclasses import replace

import grpc
import numpy as np
import pytest
from server.fakes import FACTS, FakeWorker
from server.harness import Live, array, floats, refused, text_of, tokens_of

from onebase.server.jobs import ForwardBackwardJob, GenerateJob, ScoreJob
from onebase.v1 import inference_pb2 as S
from onebase.v1 import server_pb2, training_pb2, types_pb2

PROMPT = (("system", "#20"), ("user", "#21 #22"))
PROMPT_IDS = [1, 11, 20, 14, 12, 21, 22, 14]


def chat(*messages):
    return types_pb2.Content(
        chat=types_pb2.Chat(messages=[types_pb2.ChatMessage(role=role, content=content) for role, content in messages])
    )


def sequence(prompt, completion):
    return types_pb2.Sequence(prompt=prompt, completion=completion)


def rows(live):
    return [row.tokens.tolist() for row in live.worker.wait_submitted(ScoreJob)[-1].rows]


def test_the_base_says_that_it_can_render_conversations(live):
    assert live.server.GetServerInfo(server_pb2.GetServerInfoRequest()).base.chat_template


def test_a_prompt_is_rendered_with_what_begins_the_answer(live):
    sampling = S.SamplingParams(max_new_tokens=2, seed=0)
    request = S.GenerateRequest(adapter="base", prompts=[chat(*PROMPT), text_of("#5")], sampling=sampling)
    messages = list(live.inference.Generate(request))

    (job,) = live.worker.wait_submitted(GenerateJob)
    assert [prompt.tolist() for prompt in job.prompts] == [[*PROMPT_IDS, 13], [1, 5]]
    assert {(m.prompt_index, m.prompt_tokens) for m in messages} == {(0, 9), (1, 2)}


@pytest.mark.parametrize(
    ("completion", "ids", "told"),
    [
        (chat(("assistant", "#30")), [30, 14], True),
        (chat(("assistant", "#30"), ("user", "#31"), ("assistant", "")), [30, 14, 12, 31, 14, 13, 14], True),
        (text_of("#30"), [30], True),
        (tokens_of(30), [30], False),
    ],
)
def test_a_completion_is_what_the_template_adds_for_it(live, completion, ids, told):
    request = S.LogprobRequest(adapter="base", sequences=[sequence(chat(*PROMPT), completion)])
    (result,) = live.inference.Logprob(request).results

    assert rows(live) == [[*PROMPT_IDS, 13, *ids]]
    assert result.logprobs.shape == [len(ids)]
    assert result.HasField("completion_tokens") == told
    if told:
        assert array(result.completion_tokens).tolist() == ids


@pytest.mark.parametrize(
    ("prompt", "completion", "append_eos", "ids", "appended"),
    [
        (chat(*PROMPT), chat(("assistant", "#30")), None, [*PROMPT_IDS, 13, 30, 14], False),
        (chat(*PROMPT), chat(("assistant", "#30")), True, [*PROMPT_IDS, 13, 30, 14, 2], True),
        (chat(*PROMPT), chat(("tool", "#30")), None, [5, *PROMPT_IDS[1:], 15, 30, 14], False),  # nothing is cut here
        (chat(*PROMPT), text_of("#30"), None, [*PROMPT_IDS, 13, 30, 2], True),
        (chat(*PROMPT), tokens_of(30), None, [*PROMPT_IDS, 13, 30], False),
        (None, chat(("user", "#21"), ("assistant", "#30")), None, [1, 12, 21, 14, 13, 30, 14], False),
        (text_of(""), chat(("user", "#21")), None, [1, 12, 21, 14], False),
        (tokens_of(), chat(("user", "#21")), None, [1, 12, 21, 14], False),
    ],
)
def test_a_reward_reads_a_conversation_as_one(live, prompt, completion, append_eos, ids, appended):
    request = S.RewardRequest(
        rewards=[S.RewardTerm(adapter="r1")], sequences=[sequence(prompt, completion)], append_eos=append_eos
    )
    (result,) = live.inference.Reward(request).results

    assert rows(live) == [ids]
    assert (list(result.tokens), list(result.eos_appended)) == ([len(ids)], [appended])


def test_score_reads_the_policys_cut_and_the_rewards_whole(live, session):
    terms = [S.RewardTerm(adapter="r1")]
    said = sequence(chat(*PROMPT), chat(("assistant", "#30 #31")))
    response = live.inference.Score(S.ScoreRequest(session_id=session, sequences=[said], rewards=terms))

    job = live.worker.wait_submitted(ScoreJob)[-1]
    whole = [*PROMPT_IDS, 13, 30, 31, 14]
    assert [row.tokens.tolist() for row in job.rows] == [whole, whole, whole]
    assert [row.start for row in job.rows][:2] == [9, 9]
    assert response.results[0].logprobs.shape == [3]


def test_training_takes_conversations(live, session):
    numbers = floats(0.1, 0.2)
    row = training_pb2.TrainingSequence(
        sequence=sequence(chat(*PROMPT), chat(("assistant", "#30"))),
        old_logprobs=numbers, old_values=numbers, advantages=numbers, returns=numbers,
    )  # fmt: skip
    live.training.ForwardBackward(
        training_pb2.ForwardBackwardRequest(
            session_id=session, request_id="r", sequences=[row], ppo=training_pb2.PpoLoss()
        )
    )

    (job,) = live.worker.wait_submitted(ForwardBackwardJob)
    np.testing.assert_array_equal(job.rows[0].tokens, [*PROMPT_IDS, 13, 30, 14])
    assert job.rows[0].start == 9


ANSWER = chat(("assistant", "#30"))


@pytest.mark.parametrize(
    ("prompt", "completion", "reason", "field", "says"),
    [
        (chat(), ANSWER, "REQUIRED", "prompt.chat.messages", "give at least one"),
        (chat(*PROMPT), chat(), "REQUIRED", "completion.chat.messages", "give at least one"),
        (chat(*PROMPT, ("", "x")), ANSWER, "REQUIRED", "prompt.chat.messages[2].role", "give one"),
        (chat(("wizard", "x")), ANSWER, "CHAT_REFUSED", "prompt.chat", "no role 'wizard'"),
        (chat(*PROMPT), chat(("wizard", "x")), "CHAT_REFUSED", "completion.chat", "no role 'wizard'"),
        (text_of("#5"), ANSWER, "CHAT_WITHOUT_PROMPT", "prompt", "give both as chats"),
        (tokens_of(5), ANSWER, "CHAT_WITHOUT_PROMPT", "prompt", "give both as chats"),
        (chat(*PROMPT), chat(("tool", "x")), "CHAT_NOT_CONTINUED", "completion.chat", "give it as text or tokens"),
        (chat(*PROMPT), chat(("user", "nothing")), "CHAT_NOT_CONTINUED", "completion.chat", "as text or tokens"),
        (chat(("user", "x" * 6401)), ANSWER, "CONTEXT_TOO_LONG", "prompt.chat", "6405 characters"),
        (chat(("user", "x " * 60)), ANSWER, "CONTEXT_TOO_LONG", "", "66 tokens"),
        (chat(("user", "#1000")), ANSWER, "BAD_TOKEN_ID", "prompt.chat", "1000"),
    ],
)
def test_what_is_wrong_with_a_conversation_is_named(live, prompt, completion, reason, field, says):
    request = S.LogprobRequest(adapter="base", sequences=[sequence(prompt, completion)])
    refusal = refused(live.inference.Logprob, request)

    assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
    assert (refusal.reason, refusal.field) == (reason, f"sequences[0].{field}".rstrip("."))
    assert says in refusal.message
    assert refusal.field in refusal.message


def test_a_reward_needs_both_as_conversations_too(live):
    said = [sequence(text_of("x"), ANSWER)]
    assert refused(
        live.inference.Reward, S.RewardRequest(rewards=[S.RewardTerm(adapter="r1")], sequences=said)
    ).reason == ("CHAT_WITHOUT_PROMPT")


def test_without_a_chat_template_conversations_are_refused_with_the_way_out():
    with Live(worker=FakeWorker(facts=replace(FACTS, chat_template=False))) as live:
        assert not live.server.GetServerInfo(server_pb2.GetServerInfoRequest()).base.chat_template
        request = S.GenerateRequest(
            adapter="base", prompts=[chat(*PROMPT)], sampling=S.SamplingParams(max_new_tokens=2)
        )
        refusal = refused(live.inference.Generate, request)

    assert refusal.code == grpc.StatusCode.FAILED_PRECONDITION
    assert (refusal.reason, refusal.field) == ("NO_CHAT_TEMPLATE", "prompts[0].chat")
    assert "--chat-template FILE" in refusal.message
