"""Texts over the wire, by a real server with a byte-level tokenizer: broken characters, stops, conversations."""

from __future__ import annotations

import json
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine import tokenizers_made
from support import ONEBASE, environment, start_server
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from onebase.client import Client, SamplingParams, Sequence, connect
from onebase.client.errors import FailedPreconditionError, InvalidArgumentError

BROKEN = "\N{REPLACEMENT CHARACTER}"
TEMPLATE = (
    "<s>{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.role }}:{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
CHAT = [{"role": "system", "content": "短く"}, {"role": "user", "content": "How was the film? 🎬"}]
ANSWER = [{"role": "assistant", "content": "très naïf 😀"}]
MANY = SamplingParams(max_new_tokens=100, n=8, temperature=1.5, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base whose tokenizer has no chat template."""
    path = tmp_path_factory.mktemp("texts") / "base"
    tokenizer = tokenizers_made.byte_level()
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "vocab_size": len(tokenizer) + 8}  # more than there are tokens
    LlamaForCausalLM(LlamaConfig(max_position_embeddings=256, **shape, **ids)).save_pretrained(path)
    (path / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def client(base: Path) -> Iterator[Client]:
    flags = ["--chat-template", str(base / "chat.jinja"), "--threads", "1", "--root", str(base.parent), "--policy", "p"]
    with start_server(base, *flags) as server, connect(server.address) as client:
        yield client


@pytest.mark.parametrize("prompt", ["The film", CHAT], ids=["text", "chat"])
def test_streamed_pieces_are_the_decoded_tokens_and_break_no_character(
    client: Client, tokenizer: PreTrainedTokenizerFast, prompt: str | list[dict[str, str]]
) -> None:
    pieces, tokens = defaultdict(list), defaultdict(list)
    with client.stream(prompt, adapter="base", sampling=MANY) as chunks:
        for chunk in chunks:
            pieces[chunk.completion_index].append(chunk.text)
            tokens[chunk.completion_index] += chunk.tokens.tolist()

    whole = client.generate(prompt, adapter="base", sampling=MANY)
    for completion in whole:
        index = completion.completion_index
        assert tokens[index] == completion.tokens.tolist()
        decoded = tokenizer.decode(tokens[index], skip_special_tokens=True)
        assert "".join(pieces[index]) == completion.text == decoded
        assert sum(piece != "" for piece in pieces[index]) > 20  # they came as they were written
    assert any(BROKEN in completion.text for completion in whole)  # a random model writes broken ones
    assert any(ord(character) > 127 and character != BROKEN for one in whole for character in one.text)


def test_a_stop_is_found_wherever_its_characters_are_cut(client: Client) -> None:
    tried = 0
    for completion in client.generate("The film", adapter="base", sampling=MANY):
        text = completion.text
        ends = [at for at, character in enumerate(text) if ord(character) > 127 and character != BROKEN and at > 2]
        for at in ends[:1]:
            stop = text[at - 2 : at + 1]
            sampling = SamplingParams(**{**vars(MANY), "stop": (stop,)})
            streamed = defaultdict(str)
            with client.stream("The film", adapter="base", sampling=sampling) as chunks:
                for chunk in chunks:
                    streamed[chunk.completion_index] += chunk.text
            assert streamed[completion.completion_index] == text[: text.index(stop)]
            tried += 1
    assert tried > 3


def test_conversations_are_scored_as_transformers_renders_them(
    client: Client, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(CHAT + ANSWER, return_dict=False)
    assert client.info().base.chat_template

    (said,) = client.logprob(Sequence(CHAT, ANSWER), adapter="base")
    (by_ids,) = client.logprob(Sequence(prompt, whole[len(prompt) :]), adapter="base")

    assert said.completion_tokens is not None
    assert said.completion_tokens.tolist() == whole[len(prompt) :]
    assert said.logprobs.tolist() == by_ids.logprobs.tolist()
    with pytest.raises(InvalidArgumentError, match=r"sequences\[0\]\.completion\.chat: .* no tools"):
        client.logprob(Sequence(CHAT, [{"role": "tool", "content": "x"}]), adapter="base")


def test_every_writing_comes_back(client: Client, tokenizer: PreTrainedTokenizerFast) -> None:
    for text in (*tokenizers_made.CORPUS, "e\u0301\u200d\u200f🏳️‍🌈", " two  spaces \n"):
        (said,) = client.logprob(Sequence("x", text), adapter="base")
        assert said.completion_tokens is not None
        assert tokenizer.decode(said.completion_tokens) == text


def test_an_adapter_with_another_tokenizer_is_refused_and_served_with_its_own(client: Client, base: Path) -> None:
    client.save_adapter("p", str(base.parent / "saved"))
    other = tokenizers_made.byte_level()
    other.add_tokens(["<|im_start|>"])
    other.save_pretrained(base.parent / "saved")

    with pytest.raises(FailedPreconditionError, match=r"<\|im_start\|>") as caught:
        client.load_adapter("q", str(base.parent / "saved"), kind="policy")
    assert caught.value.reason == "TOKENIZER_MISMATCH"

    manifest = base.parent / "saved" / "onebase.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "tokenizer": None}))
    flags = ["--tokenizer", str(base.parent / "saved"), "--policy", f"q={base.parent / 'saved'}", "--threads", "1"]
    with start_server(base, *flags) as server, connect(server.address) as another:
        (said,) = another.logprob(Sequence("x", "<|im_start|>"), adapter="q")
        assert said.completion_tokens is not None
        assert said.completion_tokens.tolist() == [len(other) - 1]
        assert not another.info().base.chat_template


def test_a_file_that_is_no_template_is_refused(base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for m in messages %}", encoding="utf-8")
    command = [*ONEBASE, "serve", str(base), "--chat-template", str(broken), "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert ended.returncode == 1
    assert "is no Jinja template" in ended.stderr
