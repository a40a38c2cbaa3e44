"""Conversations become the tokens that transformers and TRL make of them, with templates that people use."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import trl.data_utils
from engine import tokenizers_made
from server.fakes import FACTS
from transformers import PreTrainedTokenizerFast

from onebase.server.codec.sequences import SequenceReader
from onebase.server.config import Limits
from onebase.server.engine.text import Text, has_chat_template
from onebase.server.errors import InvalidArgument
from onebase.server.texts import Texts
from onebase.v1 import types_pb2

TEMPLATES = Path(trl.data_utils.__file__).parent / "chat_templates"
NAMES = ("qwen2_5", "qwen3", "llama3", "gemma", "phi3", "lfm2")
CONVERSATION = [
    {"role": "system", "content": "Be brief. 短く"},
    {"role": "user", "content": "How was the film? 🎬"},
    {"role": "assistant", "content": "A delight."},
    {"role": "user", "content": "And the acting?\n"},
]
CHOSEN = [{"role": "assistant", "content": "Très naïf 😀"}]
REJECTED = [{"role": "assistant", "content": ""}]


def conversation(name: str) -> list[dict[str, str]]:
    return CONVERSATION[1:] if name == "gemma" else CONVERSATION  # which knows no system prompt


def tokenizer_with(name: str) -> PreTrainedTokenizerFast:
    tokenizer = tokenizers_made.byte_level()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]}
    )
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer


def content(said: Any) -> types_pb2.Content:
    if isinstance(said, str):
        return types_pb2.Content(text=said)
    return types_pb2.Content(chat=types_pb2.Chat(messages=[types_pb2.ChatMessage(**message) for message in said]))


class Reading:
    """The server's reader of requests, on a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        facts = {**vars(FACTS), "vocab_size": len(tokenizer), "max_context": 4096, "eos_token_ids": (1,)}
        self._texts = Texts(Text(tokenizer))
        self._reader = SequenceReader(self._texts, type(FACTS)(**facts), Limits())

    def pair(self, prompt: Any, completion: Any) -> tuple[list[int], list[int]]:
        said = types_pb2.Sequence(prompt=content(prompt), completion=content(completion))
        (pair,) = asyncio.run(self._reader.pairs([said], ["sequences[0]"]))
        return pair.prompt.tolist(), pair.completion.tolist()

    def reward(self, prompt: Any, completion: Any) -> list[int]:
        said = types_pb2.Sequence(prompt=content(prompt), completion=content(completion))
        (row,) = self._reader.reward_tokens(asyncio.run(self._reader.joined([said])), None)
        return row.tokens.tolist()


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    return tokenizer_with(name)


def ids(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], **settings: Any) -> list[int]:
    """As TRL's trainers tokenize a conversation."""
    found: list[int] = trl.data_utils._tokenize(tokenizer, messages, **settings)["input_ids"]
    return found


@pytest.mark.parametrize("answer", [CHOSEN, REJECTED], ids=["chosen", "rejected"])
def test_prompt_and_completion_are_those_of_trls_dpo_and_sft(
    tokenizer: PreTrainedTokenizerFast, name: str, answer: list[dict[str, str]]
) -> None:
    prompt = conversation(name)
    prompt_ids = ids(tokenizer, prompt, add_generation_prompt=True)
    whole = ids(tokenizer, prompt + answer)
    assert trl.data_utils.common_prefix_length(prompt_ids, whole) == len(prompt_ids)

    assert Reading(tokenizer).pair(prompt, answer) == (prompt_ids, whole[len(prompt_ids) :])


def test_they_are_the_texts_that_trl_renders(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    prompt = conversation(name)
    rendered = trl.data_utils.apply_chat_template({"prompt": prompt, "completion": CHOSEN}, tokenizer)

    found = Reading(tokenizer).pair(prompt, CHOSEN)

    assert [tokenizer.decode(part) for part in found] == [rendered["prompt"], rendered["completion"]]


def test_a_reward_reads_what_trls_reward_trainer_trained_it_on(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    prompt = conversation(name)
    reading = Reading(tokenizer)

    assert reading.reward(prompt, CHOSEN) == ids(tokenizer, prompt + CHOSEN)
    assert reading.reward("", prompt + REJECTED) == ids(tokenizer, prompt + REJECTED)


def test_a_text_goes_on_behind_the_generation_prompt(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    prompt = ids(tokenizer, conversation(name), add_generation_prompt=True)
    text = tokenizer("A delight", add_special_tokens=False)["input_ids"]
    reading = Reading(tokenizer)

    assert reading.pair(conversation(name), "A delight") == (prompt, text)
    assert reading.reward(conversation(name), "A delight") == [*prompt, *text, 1]


def test_what_would_melt_into_the_prompts_last_token_stays_the_completions() -> None:
    tokenizer = tokenizers_made.byte_level()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    prompt = ids(tokenizer, CONVERSATION, add_generation_prompt=True)
    answer = [{"role": "assistant", "content": "très naïf 😀"}]
    melted = ids(tokenizer, CONVERSATION + answer)
    assert trl.data_utils.common_prefix_length(prompt, melted) < len(prompt)

    found = Reading(tokenizer).pair(CONVERSATION, answer)

    assert found == (prompt, tokenizer("très naïf 😀</s>", add_special_tokens=False)["input_ids"])
    assert tokenizer.decode([*found[0], *found[1]]) == tokenizer.decode(melted)


def test_the_templates_own_special_tokens_are_not_doubled() -> None:
    tokenizer = tokenizer_with("llama3")
    prompt, _ = Reading(tokenizer).pair(conversation("llama3"), CHOSEN)

    assert prompt.count(tokenizer.bos_token_id) == 1
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id  # which would else be a second one


def test_a_templates_own_refusal_reaches_the_client() -> None:
    with pytest.raises(InvalidArgument, match=r"sequences\[0\]\.prompt\.chat: .*System role not supported") as caught:
        Reading(tokenizer_with("gemma")).pair(CONVERSATION, CHOSEN)
    assert (caught.value.reason, caught.value.field) == ("CHAT_REFUSED", "sequences[0].prompt.chat")


def test_a_template_that_renders_the_prompt_otherwise_is_refused() -> None:
    tokenizer = tokenizer_with("deepseekv3")  # which begins an answer in one way and repeats it in another

    with pytest.raises(InvalidArgument) as caught:
        Reading(tokenizer).pair(CONVERSATION, CHOSEN)
    assert caught.value.reason == "CHAT_NOT_CONTINUED"
    assert Reading(tokenizer).reward(CONVERSATION, CHOSEN) == ids(tokenizer, CONVERSATION + CHOSEN)


def test_what_a_template_may_be() -> None:
    tokenizer = tokenizers_made.byte_level()
    assert not has_chat_template(tokenizer)
    tokenizer.chat_template = {"rag": "x"}
    assert not has_chat_template(tokenizer)
    tokenizer.chat_template = {"default": "x", "rag": "y"}
    assert has_chat_template(tokenizer)
    broken = tokenizers_made.byte_level()
    broken.chat_template = "{{ messages[99].content.x }}{{ 1 / 0 }}"
    with pytest.raises(ValueError, match="the chat template fails with these messages"):
        Text(broken).encode_chat(CHOSEN, generation_prompt=True)
