"""Every algorithm in the one loop: it learns, it is resumed bit for bit, and it says what it cannot use."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console
from trainer.toy import GOOD, ToyAdapter, ToyClient, ToyServer, encode, without_times

from onebase.trainer import (
    ConfigError,
    DpoConfig,
    EvalConfig,
    GenerationConfig,
    GrpoConfig,
    LogConfig,
    PpoConfig,
    PromptsConfig,
    ReinforcePpConfig,
    RewardTerm,
    RlooConfig,
    SftConfig,
    TrainConfig,
    train,
)
from onebase.trainer.checkpoint import load_state
from onebase.trainer.display import LiveDisplay, PlainDisplay

ON_POLICY = {
    "ppo": PpoConfig(learning_rate=0.05, batch_size=32, mini_batch_size=8, ppo_epochs=2, init_kl_coef=0.01),
    "grpo": GrpoConfig(
        learning_rate=0.05, batch_size=32, mini_batch_size=8, num_generations=4, num_iterations=2, beta=0.01
    ),
    "rloo": RlooConfig(
        learning_rate=0.05, batch_size=32, mini_batch_size=8, num_generations=4, num_iterations=2, beta=0.01
    ),
    "reinforce_pp": ReinforcePpConfig(
        learning_rate=0.05, batch_size=32, mini_batch_size=8, num_iterations=2, kl_coef=0.01
    ),
}
SFT = SftConfig(learning_rate=0.1, batch_size=4, mini_batch_size=2)
DPO = DpoConfig(learning_rate=0.1, batch_size=4, mini_batch_size=2)
SECTIONS = {**ON_POLICY, "sft": SFT, "dpo": DPO}
WITHOUT_HEAD = ("grpo", "rloo", "reinforce_pp", "sft", "dpo")


@pytest.fixture
def config(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": text, "completion": "cc", "chosen": "cc", "rejected": "bdd"} for text in "abcde"]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainConfig(
        prompts=PromptsConfig(str(prompts)),
        rewards=(RewardTerm("good"),),
        generation=GenerationConfig(max_new_tokens=6),
        eval=EvalConfig(samples=5, every=2),
        steps=6,
        output_dir=str(tmp_path / "run"),
        log=LogConfig(tensorboard=False),
    )


def by(algorithm, config, **changes):
    return dataclasses.replace(config, algorithm=algorithm, **{algorithm: SECTIONS[algorithm]}, **changes)


def run(config, server, **options):
    out = io.StringIO()
    summary = train(config, server.client(), display=PlainDisplay(Console(file=out, width=200)), **options)
    return summary, out.getvalue()


def lines(config, name="metrics.jsonl"):
    return [json.loads(line) for line in (config.output_path / name).read_text().splitlines()]


def stop_after(steps):
    asked = iter(range(10**9))
    return lambda: next(asked) >= steps


@pytest.mark.parametrize("algorithm", ON_POLICY)
def test_the_policy_learns_what_is_rewarded(config, algorithm):
    config = by(algorithm, config, steps=25, eval=EvalConfig(samples=0), seed=3)
    summary, shown = run(config, ToyServer())
    first, last = lines(config)[0], lines(config)[-1]
    assert last["env/reward_mean"] > 0.75 > 0.3 > first["env/reward_mean"]
    assert 0 < summary["kl"] < 100
    assert {f"{algorithm}/loss/policy", f"{algorithm}/policy/entropy", f"time/{algorithm}/total"} < last.keys()
    assert "kl_coef 0.0100" in shown


@pytest.mark.parametrize("algorithm", SECTIONS)
@pytest.mark.parametrize("meanwhile", ["nothing", "server restarted"])
def test_a_resumed_run_is_the_run_that_was_never_interrupted(config, tmp_path, algorithm, meanwhile):
    undisturbed = by(algorithm, config, output_dir=str(tmp_path / "undisturbed"))
    server, other = ToyServer(), ToyServer()
    run(undisturbed, other)
    config = by(algorithm, config, save_every=2)
    summary, _ = run(config, server, stop=stop_after(3))
    assert summary is None
    if meanwhile == "server restarted":
        server.restart()
    run(config, server)

    def numbers(config):
        return [{k: v for k, v in without_times(line).items() if k != "adapter_version"} for line in lines(config)]

    assert numbers(config) == numbers(undisturbed)
    assert lines(config, "samples.jsonl") == lines(undisturbed, "samples.jsonl")
    np.testing.assert_array_equal(server.adapters["policy_1"].weights, other.adapters["policy_1"].weights)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_a_group_is_completions_of_one_prompt_drawn_in_one_call(config, algorithm):
    server = ToyServer()
    config = by(algorithm, config, steps=1, eval=EvalConfig(samples=0), log=LogConfig(tensorboard=False, samples=32))
    run(config, server)
    prompts = [sample["prompt"] for sample in lines(config, "samples.jsonl")]
    assert len(prompts) == 32
    assert all(len(set(prompts[start : start + 4])) == 1 for start in range(0, 32, 4))
    (score,) = (call for kind, call in server.calls if kind == "score")
    assert set(score["outputs"]) == {"logprobs", "reference_logprobs", "rewards"}
    assert load_state(config.output_path).prompts_taken == 8


@pytest.mark.parametrize("algorithm", ON_POLICY)
def test_an_exact_server_is_asked_for_the_reference_alone_and_nothing_changes(config, algorithm):
    found = {}
    for exact in (False, True):
        server = ToyServer(exact=exact)
        result = by(algorithm, config, steps=2, eval=EvalConfig(samples=0), output_dir=f"{config.output_dir}-{exact}")
        run(result, server)
        asked = next(call["outputs"] for kind, call in server.calls if kind == "score")
        found[exact] = asked, [without_times(line) for line in lines(result)]
    assert set(found[True][0]) == {"reference_logprobs", "rewards"}
    assert found[True][1] == found[False][1]


def test_without_reference_or_reward_adapter_an_exact_server_is_not_asked_to_score(config, tmp_path):
    (tmp_path / "rewards.py").write_text(
        "def short(prompts, completions):\n    return [-len(c) for c in completions]\n"
    )
    server = ToyServer(exact=True)
    grpo = GrpoConfig(batch_size=4, mini_batch_size=4, num_generations=2)
    changes = {"rewards": (), "reward_function": f"{tmp_path / 'rewards.py'}:short", "eval": EvalConfig(samples=0)}
    summary, shown = run(dataclasses.replace(config, algorithm="grpo", grpo=grpo, steps=1, **changes), server)
    assert "score" not in [kind for kind, _ in server.calls]
    assert summary["kl"] is None
    assert "kl " not in shown


@pytest.mark.parametrize("algorithm", WITHOUT_HEAD)
def test_only_ppo_wants_a_value_head(config, algorithm):
    server = ToyServer()
    run(by(algorithm, config, steps=1), server)
    assert not server.adapters["policy_1"].value_head
    server = ToyServer()
    server.adapters["policy_1"] = ToyAdapter("policy_1", 1.0, value_head=False)
    run(by(algorithm, config, steps=1, resume="never"), server)
    with pytest.raises(ConfigError, match="has no value head, which PPO needs"):
        run(by("ppo", config, steps=1, resume="never"), server)


def test_another_algorithms_run_is_not_gone_on_with(config):
    server = ToyServer()
    run(by("ppo", config, steps=1), server)
    with pytest.raises(ConfigError, match=r"algorithm: .* holds a run of ppo, not of grpo; .* resume: never"):
        run(by("grpo", config, steps=2), server)


# ---------------------------------------------------------------------------------------------------- SFT and DPO


def test_sft_learns_the_rows_completions_and_their_end(config):
    server = ToyServer()
    config = by("sft", config, steps=40)
    summary, shown = run(config, server)
    losses = [line["sft/loss/total"] for line in lines(config) if line["step"]]
    assert losses[0] > 1.5 > 0.7 > losses[-1]  # after "c" comes another, or the end: that much cannot be known
    assert summary["reward_after"] > summary["reward_before"] + 0.2  # rewards only look on
    assert "loss " in shown
    assert "reward " not in shown.split("step 1/40")[1]
    batch = next(call for kind, call in server.calls if kind == "forward_backward")
    assert [list(row.completion) for row in batch["sequences"]] == [[GOOD, GOOD, 0]] * 2
    assert batch["denominator"] == 12.0  # the tokens of both passes


def test_sft_takes_token_ids_as_they_are_and_needs_no_rewards(config, tmp_path):
    rows = [{"prompt": encode("ab"), "answer": [2, 0]}, {"prompt": encode("c"), "answer": [4]}]
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = SftConfig(batch_size=2, mini_batch_size=2, completion_column="answer", epochs=3)
    config = dataclasses.replace(
        config, algorithm="sft", sft=section, rewards=(), prompts=PromptsConfig(str(tmp_path / "ids.jsonl"))
    )
    server = ToyServer()
    summary, _ = run(config, server)
    assert summary["steps"] == 3
    assert summary["reward_after"] is None
    assert "logprob" not in [kind for kind, _ in server.calls]
    completions = [
        [*row.completion] for kind, c in server.calls if kind == "forward_backward" for row in c["sequences"]
    ]
    assert sorted(map(tuple, completions)) == [(2, 0)] * 3 + [(4, 0)] * 3


def test_a_base_without_an_end_of_sequence_is_told_of(config, monkeypatch):
    server, info = ToyServer(), ToyClient.info
    base = dataclasses.replace(server.client().info().base, eos_token_ids=())
    monkeypatch.setattr(ToyClient, "info", lambda client: dataclasses.replace(info(client), base=base))
    config = by("sft", config, steps=1, eval=EvalConfig(samples=0))
    with pytest.raises(ConfigError, match=r"sft\.append_eos: is true, but the base has no end-of-sequence token"):
        run(config, server)
    run(dataclasses.replace(config, sft=dataclasses.replace(SFT, append_eos=False)), server)
    batch = next(call for kind, call in server.calls if kind == "forward_backward")
    assert [list(row.completion) for row in batch["sequences"]] == [[GOOD, GOOD]] * 2


def test_epochs_set_the_number_of_steps(config):
    section = dataclasses.replace(SFT, epochs=2)  # five rows, four to a step
    summary, shown = run(dataclasses.replace(config, algorithm="sft", sft=section, steps=99), ToyServer())
    assert summary["steps"] == 3
    assert "step 3/3" in shown


def test_dpo_prefers_what_is_chosen(config):
    server = ToyServer()
    summary, shown = run(by("dpo", config, steps=30), server)
    losses = [line["dpo/loss/total"] for line in lines(config) if line["step"]]
    assert losses[0] == pytest.approx(np.log(2), rel=1e-5)  # policy and reference begin alike
    assert losses[-1] < 0.3
    assert summary["reward_after"] > summary["reward_before"] + 0.2
    assert "loss " in shown
    batch = next(call for kind, call in server.calls if kind == "forward_backward")
    assert [len(row.completion) for row in batch["sequences"]] == [3, 4] * 2  # chosen, then rejected, ended both
    assert batch["denominator"] == 4.0  # the pairs of both passes
    assert server.adapters["policy_1"].version == 30


@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_dpo_names_the_column_that_is_missing(config, tmp_path, column):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    del row[column]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    config = by("dpo", config, prompts=PromptsConfig(str(tmp_path / "rows.jsonl")), eval=EvalConfig(samples=0))
    with pytest.raises(ConfigError, match=rf"dpo\.{column}_column: no column '{column}'"):
        run(config, ToyServer())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "other": "b"}, r"sft\.completion_column: no column 'completion'; there are other"),
        ({"prompt": "a", "completion": ""}, r"sft\.completion_column: the row of prompt 'a' holds ''"),
        ({"prompt": "a", "completion": 3}, r"sft\.completion_column: the row of prompt 'a' holds 3"),
    ],
)
def test_rows_without_a_completion_are_named(config, tmp_path, row, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    config = by("sft", config, prompts=PromptsConfig(str(tmp_path / "rows.jsonl")), eval=EvalConfig(samples=0))
    with pytest.raises(ConfigError, match=message):
        run(config, ToyServer())


def test_a_terminal_shows_the_loss_where_there_is_no_reward(config):
    out = io.StringIO()
    display = LiveDisplay("train policy_1", Console(file=out, force_terminal=True, width=120, color_system=None))
    train(by("sft", config, steps=2, eval=EvalConfig(samples=0)), ToyServer().client(), display=display)
    assert "loss" in out.getvalue()
    assert "coefficient" not in out.getvalue()
