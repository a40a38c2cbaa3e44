"""Reward terms against PEFT's sequence classifiers: labels, biases, pooling, ends of sequence, weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from oracle.fixtures import FIXTURES, PEFT_WARNINGS, assert_close, assert_rows_close, expected_scores, sequences
from peft import LoraConfig, PeftModel, get_peft_model
from support import start_server
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from onebase.client import Client, connect
from onebase.client.errors import FailedPreconditionError, InvalidArgumentError
from onebase.client.types import RewardTerm, Sequence

pytestmark = PEFT_WARNINGS

Connect = Callable[[str], Client]
Numbers = NDArray[np.float32]

PAD, EOS = 0, 2
LABELS = 3
TARGETS = {"base": ["q_proj", "v_proj"], "base_gpt2": ["c_attn"]}
EVERY_BASE = pytest.mark.parametrize("base", list(TARGETS))


def classifier(base: str, *, labels: int = LABELS, bias: bool = True, seed: int = 5) -> PeftModel:
    """PEFT's classifier after two of torch's own updates, with a bias in its head if asked for."""
    torch.manual_seed(seed)
    plain = AutoModelForSequenceClassification.from_pretrained(FIXTURES / base, num_labels=labels)
    if bias:
        plain.score = nn.Linear(plain.score.in_features, labels)
        nn.init.normal_(plain.score.bias)
    conv1d = base == "base_gpt2"
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=TARGETS[base], fan_in_fan_out=conv1d)
    model = get_peft_model(plain, config).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ids = torch.tensor([expected_scores("base")["sequences"][-1]])
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids).logits.pow(2).sum().backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def token_scores(model: PeftModel, ids: list[int]) -> Numbers:
    """[tokens, labels]: the head on every hidden state."""
    inner = model.base_model.model
    hidden = getattr(inner, inner.base_model_prefix)(input_ids=torch.tensor([ids])).last_hidden_state
    found: Numbers = inner.score(hidden)[0].numpy()
    return found


@torch.no_grad()
def pooled(model: PeftModel, rows: list[list[int]]) -> Numbers:
    """[rows, labels]: what the classifier itself says of each row, alone."""
    found: Numbers = torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in rows]).numpy()
    return found


@contextmanager
def loaded(client: Client, model: PeftModel, place: Path, name: str = "loaded", **declared: Any) -> Iterator[str]:
    model.save_pretrained(str(place / name))
    client.load_adapter(name, str(place / name), kind="reward", **declared)
    try:
        yield name
    finally:
        client.delete_adapter(name)


# ------------------------------------------------------------------------------------------------------- labels


@EVERY_BASE
@pytest.mark.parametrize("bias", [True, False])
def test_every_label_is_pefts_at_every_token(client_of: Connect, place: Path, base: str, bias: bool) -> None:
    client, model = client_of(base), classifier(base, bias=bias)
    rows = expected_scores(base)["sequences"]
    with loaded(client, model, place) as name:
        facts = client.adapter(name)
        terms = [f"{name}[{label}]" for label in range(LABELS)]
        rewards = client.reward(sequences(base), terms, per_token=True)
        bare = client.reward(sequences(base), terms)
        client.save_adapter(name, str(place / "again"))
    assert facts.num_labels == LABELS
    for label, term in enumerate(terms):
        assert_close([reward.scores[term] for reward in rewards], pooled(model, rows)[:, label], term)
        assert_rows_close(
            [reward.token_scores[term] for reward in rewards if reward.token_scores],
            [token_scores(model, ids)[:, label] for ids in rows],
            term,
        )
    assert [reward.scores for reward in bare] == [reward.scores for reward in rewards]  # bit for bit
    plain = AutoModelForSequenceClassification.from_pretrained(FIXTURES / base, num_labels=LABELS)
    if bias:
        plain.score = nn.Linear(plain.score.in_features, LABELS)
    again = PeftModel.from_pretrained(plain, place / "again").eval()
    assert_close(pooled(again, rows), pooled(model, rows), "saved again")


def test_terms_of_adapters_and_labels_are_summed_by_weight_in_one_call(client: Client, place: Path) -> None:
    model = classifier("base")
    rows = expected_scores("base")["sequences"]
    other = np.array(expected_scores("base")["rewards"]["reward"]["alone"])
    with loaded(client, model, place) as name, client.open_session("policy_all") as session:
        terms = [RewardTerm(name, -2.0, 2), RewardTerm("reward", 0.25), RewardTerm(name, 1.5, 0)]
        rewards, scores = session.reward(sequences("base"), terms), session.score(sequences("base"), rewards=terms)
        again = session.score(
            sequences("base"), rewards={f"{name}[2]": -2.0, "reward": 0.25, f"{name}[0]": 1.5}, outputs=["rewards"]
        )
    expected = pooled(model, rows)
    for answered in (rewards, scores, again):
        assert list(answered[0].scores) == [f"{name}[2]", "reward", f"{name}[0]"]
        assert_close([one.scores[f"{name}[2]"] for one in answered], expected[:, 2], "label 2")
        assert_close([one.scores["reward"] for one in answered], other, "reward")
        assert_close([one.scores[f"{name}[0]"] for one in answered], expected[:, 0], "label 0")
        weighted = -2.0 * expected[:, 2] + 0.25 * other + 1.5 * expected[:, 0]
        assert_close([one.reward for one in answered], weighted, "weighted sum", scale=np.abs(expected).max())


def test_a_label_that_is_not_there_or_not_named_is_refused(client: Client, place: Path) -> None:
    with loaded(client, classifier("base"), place) as name:
        for rewards, field in ((name, "rewards[0].label"), (["reward", f"{name}[3]"], "rewards[1].label")):
            with pytest.raises(InvalidArgumentError, match="0 to 2") as refused:
                client.reward([Sequence([5], [6])], rewards)
            assert refused.value.field == field
        with pytest.raises(FailedPreconditionError, match="3 labels, and a value head has one") as several:
            client.create_adapter("critic", kind="critic", init_from=name)
        assert (several.value.reason, several.value.field) == ("SEVERAL_LABELS", "init_from")


# ------------------------------------------------------------------------------------------------------ pooling


@pytest.fixture(scope="module")
def ending_in_pads(root: Path) -> Iterator[Client]:
    """A server whose base has one token for padding and end of sequence, as many a base model has."""
    path = root / "base_pad_is_eos"
    shutil.copytree(FIXTURES / "base", path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(path)
    with (
        start_server(path, "--root", str(root), "--threads", "1", "--policy", "p") as server,
        connect(server.address) as client,
    ):
        assert client.info().base.pad_token_id == EOS
        yield client


ENDINGS = ([5, 9, 17], [5, 9, EOS], [5, EOS, EOS, EOS], [EOS, 8, EOS], [EOS, 8, 9], [EOS, EOS], [EOS], [7])


@pytest.mark.parametrize("pooling", ["last_token", "last_not_pad"])
def test_scores_are_read_where_the_rule_says(ending_in_pads: Client, place: Path, pooling: Any) -> None:
    client, model = ending_in_pads, classifier("base", labels=2, bias=False)
    model.config.pad_token_id = EOS
    rows = [list(row) for row in ENDINGS]
    expected = pooled(model, rows)
    if pooling == "last_token":
        last = np.stack([token_scores(model, ids)[-1] for ids in rows])
        assert not np.allclose(expected, last)
        expected = last
    ids = [Sequence([], row) for row in rows]
    with (
        loaded(client, model, place) as name,
        loaded(client, model, place, "declaring", pooling=pooling) as declaring,
        client.open_session("p") as session,
    ):
        prompted = [row for row in ENDINGS if len(row) > 1]
        scores = session.score(
            [Sequence(row[:1], row[1:]) for row in prompted], rewards=f"{name}[1]", outputs=["rewards"], pooling=pooling
        )
        assert_close(
            [one.reward for one in scores],
            [expected[ENDINGS.index(row), 1] for row in prompted],
            "score",
            scale=float(np.abs(expected).max()),
        )
        for rewards in (
            client.reward(ids, [f"{name}[0]", f"{name}[1]"], pooling=pooling),
            client.reward(ids, [f"{name}[0]", f"{name}[1]"], pooling=pooling, per_token=True),
            client.reward(ids, [f"{declaring}[0]", f"{declaring}[1]"]),
        ):
            assert_close([list(reward.scores.values()) for reward in rewards], expected, pooling)
            assert [list(reward.tokens.values()) for reward in rewards] == [[len(row)] * 2 for row in rows]
        assert client.adapter(declaring).pooling == pooling
        assert client.adapter(name).pooling == "last_token"


def test_padded_batches_of_transformers_read_the_same_place(ending_in_pads: Client, place: Path) -> None:
    model = classifier("base", labels=1)
    model.config.pad_token_id = EOS
    rows = [[5, 9, 17, 8], [5, 9, EOS], [4, EOS]]
    width = max(map(len, rows))
    padded = torch.tensor([row + [EOS] * (width - len(row)) for row in rows])
    with torch.no_grad():
        expected = model(input_ids=padded).logits[:, 0].numpy()
    with loaded(ending_in_pads, model, place, pooling="last_not_pad") as name:
        rewards = ending_in_pads.reward([Sequence([], row) for row in rows], name)
    assert_close([reward.score for reward in rewards], expected, "padded")


# ---------------------------------------------------------------------------------------------- end of sequence


@pytest.mark.parametrize(
    ("declared", "asked", "text", "ids"),
    [
        (None, None, True, False),
        (True, None, True, True),
        (False, None, False, False),
        (True, False, False, False),
        (False, True, True, True),
    ],
)
def test_an_end_of_sequence_is_appended_as_asked_declared_or_to_texts(
    client: Client, place: Path, declared: bool | None, asked: bool | None, text: bool, ids: bool
) -> None:
    model = classifier("base", labels=1)
    row = [1, 7, 9]  # "<s> w7 w9"
    with loaded(client, model, place, append_eos=declared) as name:
        assert client.adapter(name).append_eos == declared
        given = [Sequence("w7", " w9"), Sequence(row[:2], row[2:]), Sequence(row, [EOS])]
        rewards = client.reward(given, name, append_eos=asked)
    assert [reward.eos_appended[name] for reward in rewards] == [text, ids, False]
    read = [row + [EOS] * text, row + [EOS] * ids, [*row, EOS]]
    assert [reward.tokens[name] for reward in rewards] == [len(one) for one in read]
    assert_close([reward.score for reward in rewards], pooled(model, read)[:, 0], "scores")


def test_what_a_reward_declares_is_saved_with_it_and_loaded_again(client: Client, place: Path) -> None:
    model = classifier("base", labels=1)
    with loaded(client, model, place, append_eos=True, pooling="last_not_pad") as name:
        saved = client.save_adapter(name, str(place / "saved"))
    manifest = json.loads((Path(saved.path) / "onebase.json").read_text())
    assert (manifest["append_eos"], manifest["pooling"]) == (True, "last_not_pad")
    for told, known in (({}, (True, "last_not_pad")), ({"append_eos": False}, (False, "last_not_pad"))):
        client.load_adapter("again", saved.path, kind="reward", **told)
        facts = client.adapter("again")
        assert (facts.append_eos, facts.pooling) == known
        client.delete_adapter("again")


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ({"append_eos": "yes"}, "append_eos is 'yes': use true or false"),
        ({"pooling": "mean"}, "pooling is 'mean': use"),
    ],
)
def test_a_manifest_written_by_hand_is_checked(
    client: Client, place: Path, manifest: dict[str, Any], said: str
) -> None:
    classifier("base", labels=1).save_pretrained(str(place))
    (place / "onebase.json").write_text(json.dumps(manifest))
    with pytest.raises(InvalidArgumentError, match=said) as refused:
        client.load_adapter("refused", str(place), kind="reward")
    assert refused.value.reason == "BAD_MANIFEST"


def test_a_server_is_told_by_flags_how_its_rewards_read(root: Path) -> None:
    flags = ["--reward", f"r1={root / 'reward'}", "--reward", f"r2={root / 'reward_2'}"]
    flags += ["--reward-append-eos", "r1=no", "--reward-append-eos", "r2=yes", "--reward-pooling", "r2=last_not_pad"]
    flags += ["--critic", f"c1={root / 'reward'}", "--critic", "c2"]
    with start_server(root / "base", *flags) as server, connect(server.address) as client:
        (reward,) = client.reward([Sequence("w7", " w9")], ["r1", "r2"])
        assert reward.eos_appended == {"r1": False, "r2": True}
        facts = {adapter.name: adapter for adapter in client.adapters()}
        assert (facts["r1"].append_eos, facts["r1"].pooling) == (False, "last_token")
        assert (facts["r2"].append_eos, facts["r2"].pooling) == (True, "last_not_pad")
        assert [(facts[name].kind, facts[name].value_head) for name in ("c1", "c2")] == [("critic", True)] * 2
        assert "reward r2: rank 4, score head of 1, eos, read at last_not_pad" in server.text()


# ------------------------------------------------------------------------------------------------------- logits


@EVERY_BASE
def test_logits_are_those_of_the_peft_model(client_of: Connect, base: str) -> None:
    from transformers import AutoModelForCausalLM

    policy = {"base": "policy", "base_gpt2": "policy_gpt2"}[base]
    results = client_of(base).logprob(sequences(base), adapter=policy, logits=True)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(FIXTURES / base), FIXTURES / policy).eval()
    for result, sequence in zip(results, sequences(base), strict=True):
        prompt, completion = list(sequence.prompt), list(sequence.completion)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].numpy()
        assert result.logits is not None
        assert_close(result.logits, logits, "logits")
        normalized = torch.log_softmax(torch.from_numpy(result.logits.copy()), dim=-1).numpy()
        np.testing.assert_allclose(result.logprobs, normalized[np.arange(len(completion)), completion], atol=1e-6)
