"""The drop-in for TRL 0.11.4: its scripts run, and its numbers are TRL's."""

from __future__ import annotations

import difflib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from numpy.typing import NDArray
from oracle.fixtures import (
    FIXTURES,
    assert_close,
    assert_rows_close,
    assert_same_weights,
    expected_scores,
    replay,
    saved_weights,
    weights_after,
)
from peft import LoraConfig
from support import environment
from transformers import AutoTokenizer

from onebase.client import Client, connect
from onebase.client.errors import AlreadyExistsError, OnebaseError
from onebase.client.trl import AutoModelForCausalLMWithValueHead, LengthSampler, PPOConfig, PPOTrainer

EXAMPLES = Path(__file__).parents[2] / "examples" / "from_trl"

SCALES = {
    **dict.fromkeys(("ppo/loss/policy", "ppo/loss/total", "ppo/policy/advantages_mean"), 1.0),
    **dict.fromkeys(("objective/kl", "ppo/mean_non_score_reward", "ppo/policy/policykl"), 1.0),
    **dict.fromkeys(("ppo/policy/approxkl", "ppo/mean_scores", "ppo/returns/mean"), 1.0),
}
"""Least magnitudes to be relative to, for numbers that are small because large ones cancel in them."""


@pytest.fixture
def model(client: Client) -> Iterator[AutoModelForCausalLMWithValueHead]:
    with AutoModelForCausalLMWithValueHead.from_pretrained(
        client, peft_config=FIXTURES / "policy", reward_adapter="reward", ppo_adapter_name="trl"
    ) as model:
        yield model
        model.session.delete_adapter("trl")


def padded(left: bool = False) -> dict[str, torch.Tensor]:
    rows = expected_scores("base")["sequences"]
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def test_a_script_written_for_trl_gives_the_same_numbers_with_two_lines_changed(tmp_path: Path) -> None:
    """A server of its own is started, from the base's directory, as the script has none."""
    given = {"--base": FIXTURES / "base", "--policy": FIXTURES / "policy", "--reward": FIXTURES / "reward"}
    given |= {"--prompts": FIXTURES / "from_trl_prompts.txt", "--out": tmp_path / "record.json"}
    arguments = [str(word) for pair in given.items() for word in pair]
    command = [sys.executable, str(EXAMPLES / "ppo_onebase.py"), *arguments]
    subprocess.run(command, check=True, env=environment(), timeout=240)
    record = json.loads((tmp_path / "record.json").read_text())
    expected = json.loads((FIXTURES / "from_trl.json").read_text())
    assert len(record) == len(expected) == 3
    for index, (found, wanted) in enumerate(zip(record, expected, strict=True)):
        assert found["responses"] == wanted["responses"], f"step {index}"
        for name in ("rewards", "logprobs", "reference_logprobs", "values"):
            assert_close(found[name], wanted[name], f"{name} of step {index}")
        stats = {name: value for name, value in wanted["stats"].items() if not name.startswith("time/")}
        assert len(stats) > 25
        for name, value in stats.items():
            assert_close(found["stats"][name], value, f"{name} of step {index}", SCALES.get(name, 1e-3))


def test_the_two_scripts_differ_in_the_import_and_in_from_pretrained() -> None:
    old, new = ((EXAMPLES / f"ppo_{name}.py").read_text().splitlines() for name in ("trl", "onebase"))
    changes = [line for line in difflib.unified_diff(old, new, n=0, lineterm="") if line[0] in "+-"][2:]
    code = [line for line in changes if '"""' not in line and "--server" not in line]
    assert sorted(line[1:].split()[0] for line in code if line[0] == "-") == ["args.policy,", "from"]
    assert sum(line[0] == "+" and len(line) > 1 for line in code) == 2


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_compute_reward_score_is_trls_at_every_real_token(model: AutoModelForCausalLMWithValueHead, left: bool) -> None:
    inputs = padded(left)
    scores = model.compute_reward_score(**inputs)
    assert scores.shape == (*inputs["input_ids"].shape, 1)
    assert scores.dtype == torch.float32
    wanted = expected_scores("base")["rewards"]["reward"]
    real = inputs["attention_mask"].bool()
    rows = [line[kept].tolist() for line, kept in zip(scores[..., 0], real, strict=True)]
    assert_rows_close(rows, wanted["trl_token_scores"], "scores")
    # the place where TRL's users read, which TRL gets wrong under right padding
    assert_close(scores[:, -1, 0].numpy(), wanted["trl_last_token"], "the last column")


def test_the_named_policy_is_active_after_a_score_and_after_an_error(
    model: AutoModelForCausalLMWithValueHead, client: Client
) -> None:
    model.session.load_adapter("trl_2", "policy")
    try:
        model.compute_reward_score(**padded(), ppo_adapter_name="trl_2")
        assert model.policy_adapter_name == model.session.refresh().ppo_adapter_name == "trl_2"
        with pytest.raises(OnebaseError, match="1000000"):
            model.compute_reward_score(torch.tensor([[1, 1000000]]), ppo_adapter_name="trl")
        assert model.policy_adapter_name == model.session.refresh().ppo_adapter_name == "trl"
    finally:
        model.session.delete_adapter("trl_2")


def test_the_model_called_gives_the_policys_numbers_and_the_references_with_adapters_off(
    model: AutoModelForCausalLMWithValueHead,
) -> None:
    inputs, expected = padded(), expected_scores("base")
    real = inputs["attention_mask"].bool()
    logprobs, loss, values = model(**inputs)
    assert loss is None
    policy = expected["policies"]["policy"]
    assert_rows_close([row[kept[1:]] for row, kept in zip(logprobs, real, strict=True)], policy["logprobs"], "logprobs")
    assert_rows_close([row[kept] for row, kept in zip(values, real, strict=True)], policy["values"], "values")
    logits, _, _ = model(**inputs, return_logits=True)
    picked = torch.log_softmax(logits[:, :-1], -1).gather(2, inputs["input_ids"][:, 1:, None])[..., 0]
    assert_rows_close([row[kept[1:]] for row, kept in zip(picked, real, strict=True)], policy["logprobs"], "logits")
    with model.disable_adapter():
        reference, _, nothing = model(**inputs)
    assert nothing is None
    rows = [row[kept[1:]] for row, kept in zip(reference, real, strict=True)]
    assert_rows_close(rows, expected["reference"]["logprobs"], "reference")


def test_generate_gives_transformers_greedy_completions(model: AutoModelForCausalLMWithValueHead) -> None:
    expected = expected_scores("base")
    starts = expected["prompt_lengths"]
    prompts = [row[:start] for row, start in zip(expected["sequences"], starts, strict=True)]
    width = max(starts)
    ids, mask = np.zeros((len(prompts), width), int), np.zeros((len(prompts), width), int)
    for index, prompt in enumerate(prompts):
        ids[index, width - len(prompt) :], mask[index, width - len(prompt) :] = prompt, 1
    whole = model.generate(torch.tensor(ids), torch.tensor(mask), max_new_tokens=12, pad_token_id=0)
    assert whole.shape == (len(prompts), width + 12)
    for line, wanted in zip(whole[:, width:].tolist(), expected["policies"]["policy"]["greedy"], strict=True):
        assert line[: len(wanted)] == wanted
        assert not any(line[len(wanted) :])


def test_a_training_of_trls_is_replayed(client: Client, model: AutoModelForCausalLMWithValueHead, root: Path) -> None:
    record = replay("ppo_loop")
    trainer = PPOTrainer(PPOConfig(**record["config"]), model, tokenizer=AutoTokenizer.from_pretrained(root / "base"))
    orders: list[NDArray[np.int64]] = []
    trainer_random = np.random.permutation
    try:
        np.random.permutation = lambda size: np.array(orders.pop(0))  # type: ignore[assignment]
        for step in record["steps"]:
            orders += [np.array(order) for order in step["permutations"]]
            stats = trainer.step(
                [torch.tensor(query) for query in step["queries"]],
                [torch.tensor(response) for response in step["responses"]],
                [torch.tensor(score) for score in step["scores"]],
            )
            for name, wanted in step["stats"].items():
                assert_close(stats[name], wanted, name, SCALES.get(name, 1e-3))
    finally:
        np.random.permutation = trainer_random
    assert_close(trainer.kl_ctl.value, record["steps"][-1]["kl_coef_after"], "kl_coef")
    model.save_pretrained(root / "saved-by-the-drop-in")
    assert_same_weights(saved_weights(root / "saved-by-the-drop-in"), weights_after("ppo_loop"))


def test_a_policy_begins_from_a_lora_config_as_the_base(client: Client) -> None:
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM")
    with AutoModelForCausalLMWithValueHead.from_pretrained(client, peft_config=config, ppo_adapter_name="new") as model:
        spec = client.adapter("new").lora
        assert (spec.rank, spec.alpha) == (4, 8.0)
        logprobs, _, _ = model(**padded())
        with model.disable_adapter():
            reference, _, _ = model(**padded())
        assert torch.equal(logprobs, reference)
        with pytest.raises(AlreadyExistsError, match="ppo_adapter_name"):
            model.add_adapter("new", config)
        model.session.delete_adapter("new")


def test_a_generation_follows_the_global_seed(model: AutoModelForCausalLMWithValueHead) -> None:
    trainer = PPOTrainer(PPOConfig(batch_size=2, mini_batch_size=2), model)
    queries = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    options: dict[str, Any] = {"return_prompt": False, "do_sample": True, "top_k": 0, "max_new_tokens": 8}
    torch.manual_seed(3)
    first = trainer.generate(queries, **options)
    other = trainer.generate(queries, **options)
    torch.manual_seed(3)
    again, of_reference = trainer.generate(queries, generate_ref_response=True, **options)
    assert [one.tolist() for one in first] == [one.tolist() for one in again]
    assert [one.tolist() for one in first] != [one.tolist() for one in other]
    assert [one.tolist() for one in of_reference] != [one.tolist() for one in again]
    single = trainer.generate(torch.tensor([5, 6, 7]), max_new_tokens=4)
    assert single.shape[0] == 1
    assert single[0, :3].tolist() == [5, 6, 7]


def test_wrong_arguments_are_named(model: AutoModelForCausalLMWithValueHead, client: Client) -> None:
    with pytest.raises(ValueError, match="nobody"):
        AutoModelForCausalLMWithValueHead.from_pretrained(client, reward_adapter="nobody", ppo_adapter_name="trl")
    with pytest.raises(ValueError, match="load_in_8bit"):
        AutoModelForCausalLMWithValueHead.from_pretrained(client, load_in_8bit=True, ppo_adapter_name="trl")
    with pytest.raises(ValueError, match="colour"):
        AutoModelForCausalLMWithValueHead.from_pretrained(client, colour="red")
    with pytest.raises(ValueError, match="optimizer"):
        PPOTrainer(PPOConfig(), model, optimizer=object())
    trainer = PPOTrainer(PPOConfig(batch_size=2, mini_batch_size=2), model)
    with pytest.raises(ValueError, match="responses holds 1"):
        trainer.step([torch.tensor([1])] * 2, [torch.tensor([1])], [torch.tensor(0.0)] * 2)
    with pytest.raises(ValueError, match=r"scores\[1\]"):
        trainer.step([torch.tensor([1])] * 2, [torch.tensor([1])] * 2, [torch.tensor(0.0), torch.zeros(3)])
    with pytest.raises(ValueError, match="empty"):
        trainer.step([torch.tensor([1])] * 2, [torch.tensor([1]), torch.zeros(0, dtype=torch.long)], [0.0, 1.0])


def test_log_stats_adds_the_rewards(model: AutoModelForCausalLMWithValueHead) -> None:
    trainer = PPOTrainer(PPOConfig(batch_size=2, mini_batch_size=2), model)
    logs = trainer.log_stats({"objective/kl": 1.0}, {"query": [], "response": []}, [torch.tensor(1.0), 3.0])
    assert logs["env/reward_mean"] == 2.0
    assert_close(logs["env/reward_std"], 2**0.5)


def test_a_model_is_served_here_in_int8_for_as_long_as_the_script_runs() -> None:
    with AutoModelForCausalLMWithValueHead.from_pretrained(
        FIXTURES / "base", peft_config=FIXTURES / "policy", reward_adapter=FIXTURES / "reward", load_in_8bit=True
    ) as model:
        base = model.client.info().base
        assert (base.quantization, base.device) == ("int8", "cpu")
        scores = model.compute_reward_score(**padded())
        with pytest.raises(ValueError, match="which has: reward-"):  # named by what is in it, so it is loaded once
            AutoModelForCausalLMWithValueHead.from_pretrained(model.client, reward_adapter="other")
        address = model.client._transport.target
    exact = np.concatenate(expected_scores("base")["rewards"]["reward"]["trl_token_scores"])
    found = scores[..., 0][padded()["attention_mask"].bool()].numpy()
    assert 1e-4 < np.abs(found - exact).max() < 0.3 * np.abs(exact).max()  # rounded, and still this reward model
    with pytest.raises(OnebaseError):
        connect(address, wait=1.0)


def test_the_loop_of_trls_own_example_runs(model: AutoModelForCausalLMWithValueHead, root: Path) -> None:
    """examples/scripts/ppo.py of TRL 0.11.4: a data set, its data loader, a pipeline's place taken by the reward."""
    began = model.client.adapter("trl").version
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    lines = (FIXTURES / "from_trl_prompts.txt").read_text().splitlines()
    dataset = Dataset.from_dict({"text": lines})
    dataset = dataset.map(lambda sample: {"input_ids": tokenizer.encode(sample["text"]), "query": sample["text"]})
    dataset.set_format(type="torch")

    def collator(data: list[dict[str, Any]]) -> dict[str, list[Any]]:
        return {key: [row[key] for row in data] for key in data[0]}

    config = PPOConfig(batch_size=8, mini_batch_size=8, ppo_epochs=1, learning_rate=1e-4)
    trainer = PPOTrainer(config, model, None, tokenizer, dataset=dataset, data_collator=collator)
    assert (trainer.accelerator.num_processes, trainer.accelerator.device) == (1, torch.device("cpu"))
    kwargs = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": tokenizer.eos_token_id}
    sampler = LengthSampler(4, 9)
    steps = 0
    for batch in trainer.dataloader:
        queries = batch["input_ids"]
        responses, reference = trainer.generate(
            queries, return_prompt=False, generate_ref_response=True, length_sampler=sampler, **kwargs
        )
        batch["response"] = tokenizer.batch_decode(responses)
        batch["ref_response"] = tokenizer.batch_decode(reference)
        assert all(1 <= len(response) < 9 for response in responses)
        inputs = tokenizer.pad(
            {"input_ids": [torch.cat(pair).tolist() for pair in zip(queries, responses, strict=True)]},
            return_tensors="pt",
        )
        rewards = list(trainer.model.compute_reward_score(**inputs)[:, -1, 0])
        batch["ref_rewards"] = rewards
        stats = trainer.step(queries, responses, rewards)
        columns = ["query", "response", "ref_response", "ref_rewards"]
        logs = trainer.log_stats(stats, batch, rewards, columns_to_log=columns)
        assert_close(logs["env/reward_mean"], float(torch.stack(rewards).mean()))
        steps += 1
    assert steps == len(lines) // 8
    assert model.client.adapter("trl").version == began + steps
