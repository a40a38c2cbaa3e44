"""The training loop, on a policy small enough to learn in a second."""

import dataclasses
import io
import json
import os
import signal

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainer.toy import GOOD, VOCABULARY, ToyAdapter, ToyServer, without_times

from onebase.client.errors import FailedPreconditionError, NotFoundError
from onebase.trainer import (
    ConfigError,
    EvalConfig,
    GenerationConfig,
    LogConfig,
    PolicyConfig,
    PpoConfig,
    PromptsConfig,
    RewardTerm,
    TrainConfig,
    train,
)
from onebase.trainer.checkpoint import STATE_FILE, load_state
from onebase.trainer.display import PlainDisplay

PPO = PpoConfig(
    learning_rate=0.05, batch_size=32, mini_batch_size=8, ppo_epochs=2, init_kl_coef=0.01, use_score_scaling=True
)


@pytest.fixture
def config(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text, "label": i}) + "\n" for i, text in enumerate("abcde")))
    return TrainConfig(
        prompts=PromptsConfig(str(prompts)),
        rewards=(RewardTerm("good"),),
        generation=GenerationConfig(max_new_tokens=6),
        ppo=PPO,
        eval=EvalConfig(samples=5, every=2),
        steps=6,
        output_dir=str(tmp_path / "run"),
        log=LogConfig(tensorboard=False),
    )


@pytest.fixture
def server():
    return ToyServer()


def run(config, server, **options):
    """Trains and returns the summary and what was printed."""
    out = io.StringIO()
    summary = train(config, server.client(), display=PlainDisplay(Console(file=out, width=200)), **options)
    return summary, out.getvalue()


def lines(config, name="metrics.jsonl"):
    return [json.loads(line) for line in (config.output_path / name).read_text().splitlines()]


def stop_after(steps):
    """A `stop` that lets so many steps be made."""
    asked = iter(range(10**9))
    return lambda: next(asked) >= steps


# ------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize(("weight", "direction"), [(1.0, 1), (-1.0, -1)])
def test_the_policy_learns_what_is_rewarded_and_unlearns_what_is_punished(config, server, weight, direction):
    config = dataclasses.replace(
        config, steps=25, rewards=(RewardTerm("good", weight),), eval=EvalConfig(samples=0), seed=3
    )
    summary, _ = run(config, server)
    before, after = lines(config)[0]["reward/good"], lines(config)[-1]["reward/good"]
    if direction > 0:
        assert after > 0.75 > 0.3 > before
    else:
        assert after < 0.03 < 0.1 < before
    assert lines(config)[-1]["env/reward_mean"] == pytest.approx(weight * after)
    assert 0 < summary["kl"] < 100


def test_a_python_function_is_learned_from_too(config, server, tmp_path):
    source = tmp_path / "rewards.py"
    source.write_text("def brevity(prompts, completions):\n    return [-len(text) for text in completions]\n")
    config = dataclasses.replace(config, rewards=(), reward_function=f"{source}:brevity", steps=15)
    summary, _ = run(config, server)
    assert summary["reward_after"] > -1 > -2 > summary["reward_before"]
    assert lines(config)[-1]["reward/reward_function"] == pytest.approx(lines(config)[-1]["env/reward_mean"])


def test_completions_of_one_token_are_trained_on(config, server):
    config = dataclasses.replace(config, generation=GenerationConfig(max_new_tokens=1), steps=2)
    summary, _ = run(config, server)
    assert lines(config)[-1]["tokens/responses_len_mean"] == 1.0
    assert np.isfinite(summary["reward_after"])


# ---------------------------------------------------------------------------------------------- what is left


def test_a_run_leaves_metrics_samples_and_a_summary(config, server):
    summary, shown = run(config, server)
    metrics = lines(config)
    assert [line["step"] for line in metrics] == [0, 1, 2, 3, 4, 5, 6]
    assert {"eval/reward_mean", "eval/reward_std", "eval/good"} < metrics[0].keys()
    assert [line["step"] for line in metrics if "eval/reward_mean" in line] == [0, 2, 4, 6]
    steps = PPO.batch_size // PPO.mini_batch_size * PPO.ppo_epochs
    assert [line["adapter_version"] for line in metrics[1:]] == [steps * step for step in range(1, 7)]
    wanted = {"env/reward_mean", "objective/kl", "ppo/loss/total", "time/ppo/total", "time/generate", "seconds"}
    assert all(wanted < line.keys() for line in metrics[1:])

    assert json.loads((config.output_path / "summary.json").read_text()) == summary
    assert summary["steps"] == 6
    assert summary["adapter_version"] == 6 * steps == server.adapters["policy_1"].version
    assert summary["adapter_path"] == "/root/run/checkpoint-000006"
    assert summary["reward_before"] == metrics[0]["eval/reward_mean"]
    assert summary["reward_std_before"] == metrics[0]["eval/reward_std"]
    assert summary["reward_after"] == metrics[-1]["eval/reward_mean"]
    assert summary["kl"] == metrics[-1]["objective/kl"]
    assert [sample["prompt"] for sample in summary["samples"]] == list("abcde")
    assert summary["samples"][0].keys() == {"prompt", "before", "after", "reward_before", "reward_after"}

    samples = lines(config, "samples.jsonl")
    assert [sample["step"] for sample in samples] == [step for step in range(1, 7) for _ in range(2)]
    assert samples[0]["scores"]["good"] == samples[0]["reward"]
    assert "step 6/6" in shown


def test_tensorboard_reads_what_was_written(config, server):
    run(dataclasses.replace(config, log=LogConfig(tensorboard=True)), server)
    events = EventAccumulator(str(config.output_path))
    events.Reload()
    expected = [(line["step"], pytest.approx(line["ppo/loss/total"], rel=1e-6)) for line in lines(config)[1:]]
    assert [(event.step, event.value) for event in events.Scalars("ppo/loss/total")] == expected
    assert [event.step for event in events.Scalars("eval/reward_mean")] == [0, 2, 4, 6]


def test_without_evaluation_the_summary_says_nothing_of_rewards(config, server):
    summary, _ = run(dataclasses.replace(config, eval=EvalConfig(samples=0), steps=1), server)
    assert summary["reward_before"] is summary["reward_after"] is summary["scores_after"] is None
    assert summary["samples"] == []
    assert [line["step"] for line in lines(config)] == [1]


def test_held_out_prompts_are_evaluated_on(config, server, tmp_path):
    (tmp_path / "eval.csv").write_text("prompt\nee\ndd\n")
    summary, _ = run(
        dataclasses.replace(config, eval_prompts=PromptsConfig(str(tmp_path / "eval.csv")), steps=1), server
    )
    assert [sample["prompt"] for sample in summary["samples"]] == ["ee", "dd"]


def test_one_score_call_a_step_and_the_settings_reach_the_server(config, server):
    config = dataclasses.replace(config, eval=EvalConfig(samples=0), append_eos=False, steps=3)
    config = dataclasses.replace(config, policy=PolicyConfig(rank=3), ppo=dataclasses.replace(PPO, max_grad_norm=0.5))
    run(config, server)
    kinds = [kind for kind, _ in server.calls]
    assert kinds.count("score") == 3
    scores = [call for kind, call in server.calls if kind == "score"]
    assert scores[0]["append_eos"] is False
    assert set(scores[0]["outputs"]) == {"logprobs", "reference_logprobs", "values", "rewards"}
    assert next(call for kind, call in server.calls if kind == "create_adapter")["lora"].rank == 3
    assert all(call["max_grad_norm"] == 0.5 for kind, call in server.calls if kind == "optim_step")


def test_an_exact_server_is_not_asked_again_for_what_came_with_the_completions(config, server):
    """The policy's logprobs and values are the rollout's, and everything that follows is the same."""
    config = dataclasses.replace(config, eval=EvalConfig(samples=0), steps=3)
    asked = {}
    for exact in (False, True):
        server = ToyServer(exact=exact)
        result = dataclasses.replace(config, output_dir=f"{config.output_dir}-{exact}")
        run(result, server)
        outputs = [set(call["outputs"]) for kind, call in server.calls if kind == "score"]
        asked[exact] = outputs[0], [without_times(line) for line in lines(result)]
    assert asked[False][0] - asked[True][0] == {"logprobs", "values"}
    assert asked[True][1] == asked[False][1]


def test_no_steps_only_evaluate(config, server):
    summary, _ = run(dataclasses.replace(config, steps=0), server)
    assert summary["reward_after"] == summary["reward_before"]
    assert server.adapters["policy_1"].version == 0


# ---------------------------------------------------------------------------------- the same again, and going on


def test_the_same_seed_gives_the_same_run_and_another_another(config, server, tmp_path):
    run(config, server)
    again = dataclasses.replace(config, output_dir=str(tmp_path / "again"))
    run(again, ToyServer())
    other = dataclasses.replace(config, output_dir=str(tmp_path / "other"), seed=1)
    run(other, ToyServer())
    assert [without_times(line) for line in lines(config)] == [without_times(line) for line in lines(again)]
    assert lines(config)[1]["env/reward_mean"] != lines(other)[1]["env/reward_mean"]


def without_version(line):
    """A policy that was loaded anew counts its versions on from the one it replaced."""
    return {name: value for name, value in without_times(line).items() if name != "adapter_version"}


@pytest.mark.parametrize("meanwhile", ["nothing", "server restarted", "killed before a checkpoint"])
def test_a_resumed_run_is_the_run_that_was_never_interrupted(config, server, tmp_path, meanwhile):
    undisturbed = dataclasses.replace(config, output_dir=str(tmp_path / "undisturbed"))
    other = ToyServer()
    expected, _ = run(undisturbed, other)

    config = dataclasses.replace(config, save_every=2)
    summary, shown = run(config, server, stop=stop_after(3 if meanwhile != "killed before a checkpoint" else 2))
    assert summary is None
    assert not (config.output_path / "summary.json").exists()
    assert "resume: auto goes on from there" in shown
    if meanwhile == "server restarted":
        server.restart()
    if meanwhile == "killed before a checkpoint":  # three steps more, of which the state knows nothing
        state = (config.output_path / STATE_FILE).read_text()
        run(dataclasses.replace(config, save_every=0), server, stop=stop_after(3))
        (config.output_path / STATE_FILE).write_text(state)
    loads_before = [kind for kind, _ in server.calls].count("load_adapter")
    summary, shown = run(config, server)

    assert ("load_adapter" in [kind for kind, _ in server.calls][loads_before:]) == (meanwhile != "nothing")
    assert "going on after step" in shown
    assert [without_version(line) for line in lines(config)] == [without_version(line) for line in lines(undisturbed)]
    assert lines(config, "samples.jsonl") == lines(undisturbed, "samples.jsonl")
    np.testing.assert_array_equal(server.adapters["policy_1"].weights, other.adapters["policy_1"].weights)
    ignored = {"adapter_version", "adapter_path"}
    assert {k: v for k, v in summary.items() if k not in ignored} == {
        k: v for k, v in expected.items() if k not in ignored
    }


def test_more_steps_go_on_from_the_end_of_a_finished_run(config, server):
    run(dataclasses.replace(config, steps=4), server)
    summary, _ = run(config, server)
    assert summary["steps"] == 6
    assert [line["step"] for line in lines(config)] == [0, 1, 2, 3, 4, 5, 6]


def test_resuming_a_finished_run_tells_its_summary_again(config, server):
    first, _ = run(config, server)
    trained = server.adapters["policy_1"].version
    second, _ = run(config, server)
    assert second == first
    assert server.adapters["policy_1"].version == trained


def test_never_begins_anew_and_forgets_the_old_state(config, server):
    run(config, server)
    fresh = dataclasses.replace(config, resume="never")
    run(fresh, server, stop=stop_after(0))
    assert load_state(config.output_path) is None
    assert [line["step"] for line in lines(config)] == [0]


def test_must_needs_a_state(config, server):
    with pytest.raises(ConfigError, match=r"resume: .* holds no trainer_state\.json"):
        run(dataclasses.replace(config, resume="must"), server)
    run(dataclasses.replace(config, steps=1), server)
    run(dataclasses.replace(config, resume="must"), server)


def test_another_policys_run_is_not_gone_on_with(config, server):
    run(dataclasses.replace(config, steps=1), server)
    with pytest.raises(ConfigError, match=r"policy\.name: .* holds a run of 'policy_1', not of 'other'"):
        run(dataclasses.replace(config, policy=PolicyConfig(name="other")), server)


# --------------------------------------------------------------------------------------- checkpoints and signals


def test_checkpoints_are_made_every_so_many_steps_and_at_the_end(config, server):
    run(dataclasses.replace(config, save_every=4), server)
    assert sorted(server.checkpoints) == ["/root/run/checkpoint-000004", "/root/run/checkpoint-000006"]
    assert all(with_optimizer for _, with_optimizer in server.checkpoints.values())
    state = load_state(config.output_path)
    assert (state.step, state.adapter.path) == (6, "/root/run/checkpoint-000006")


def test_a_server_that_cannot_save_is_put_up_with_unless_saving_was_asked_for(config, tmp_path):
    server = ToyServer(can_save=False)
    summary, shown = run(config, server)
    assert summary["adapter_path"] == ""
    assert "the adapter stays on the server, unsaved: the server has no save root" in shown
    with pytest.raises(FailedPreconditionError):
        run(dataclasses.replace(config, save_every=2, output_dir=str(tmp_path / "other")), ToyServer(can_save=False))


def test_without_checkpoints_an_interrupted_run_goes_on_while_the_server_lives(config, tmp_path):
    expected, _ = run(dataclasses.replace(config, output_dir=str(tmp_path / "undisturbed")), ToyServer(can_save=False))
    server = ToyServer(can_save=False)
    run(config, server, stop=stop_after(3))
    summary, shown = run(config, server)
    assert "policy_1 is on the server as it was left" in shown
    assert summary == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step_that_is_under_way(config, server, tmp_path, number):
    source = tmp_path / "signals.py"
    source.write_text(
        "import itertools, os\n"
        "calls = itertools.count()\n"
        "def send(prompts, completions):\n"
        f"    if next(calls) == 2: os.kill({os.getpid()}, {int(number)})\n"
        "    return [0.0] * len(completions)\n"
    )
    before = signal.getsignal(number)
    config = dataclasses.replace(config, eval=EvalConfig(samples=0), reward_function=f"{source}:send")
    summary, shown = run(config, server)
    assert summary is None
    assert "interrupted after step 3" in shown
    assert load_state(config.output_path).step == 3
    assert [line["step"] for line in lines(config)] == [1, 2, 3]
    assert server.sessions == {}  # the lease was given back
    assert signal.getsignal(number) is before


def test_an_error_gives_the_lease_back(config, server):
    with pytest.raises(NotFoundError):
        run(dataclasses.replace(config, rewards=(RewardTerm("nobody"),)), server)
    assert server.sessions == {}


def test_completions_that_are_not_the_policys_own_are_warned_of(config, server):
    weights = np.zeros((VOCABULARY, VOCABULARY + 1))
    weights[:, GOOD] = 8.0  # hardly ever anything else, but the temperature draws all alike
    server.adapters["policy_1"] = ToyAdapter("policy_1", 1.0, weights=weights)
    config = dataclasses.replace(config, generation=GenerationConfig(max_new_tokens=6, temperature=50.0), steps=1)
    _, shown = run(config, server)
    assert lines(config)[1]["objective/kl"] < -1
    assert "below zero: are completions drawn from the policy itself (temperature 1" in shown


def test_an_output_directory_that_cannot_be_made_is_named(config, server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir: .* cannot be made"):
        run(dataclasses.replace(config, output_dir=str(tmp_path / "file" / "run")), server)
