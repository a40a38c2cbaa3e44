"""PPO with a critic of its own: an adapter that tells the values and learns them."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console
from trainer.toy import VOCABULARY, ToyAdapter, ToyServer, policy_session, without_times

from onebase.client import types as t
from onebase.trainer import (
    ConfigError,
    CriticConfig,
    EvalConfig,
    GenerationConfig,
    LogConfig,
    PpoConfig,
    PpoStepper,
    PromptsConfig,
    RewardTerm,
    TrainConfig,
    train,
)
from onebase.trainer.checkpoint import load_state
from onebase.trainer.display import PlainDisplay

PPO = PpoConfig(learning_rate=0.05, batch_size=32, mini_batch_size=8, ppo_epochs=2, init_kl_coef=0.01)


@pytest.fixture
def config(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in "abcde"))
    return TrainConfig(
        prompts=PromptsConfig(str(prompts)),
        critic=CriticConfig(init_from="good"),
        rewards=(RewardTerm("good"),),
        generation=GenerationConfig(max_new_tokens=6),
        ppo=PPO,
        eval=EvalConfig(samples=0),
        steps=6,
        output_dir=str(tmp_path / "run"),
        log=LogConfig(tensorboard=False),
    )


def run(config, server, **options):
    out = io.StringIO()
    summary = train(config, server.client(), display=PlainDisplay(Console(file=out, width=200)), **options)
    return summary, out.getvalue()


def lines(config):
    found = [json.loads(line) for line in (config.output_path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in without_times(line).items() if k != "adapter_version"} for line in found]


def test_a_critic_and_a_value_head_that_know_as_much_teach_the_policy_the_same():
    """The toy's policy and value share nothing, so a critic must give what a head gives, the policy unclipped."""
    found = {}
    for critic in ("", "critic_1"):
        session = policy_session()
        session.create_adapter("critic_1", kind="critic")
        config = dataclasses.replace(PPO, batch_size=4, mini_batch_size=2, vf_coef=1.0)
        stepper = PpoStepper(session, config, critic=critic, rng=np.random.default_rng(5))
        for scores in ([1.0, 0.0, 2.0, -1.0], [0.5, 0.0, -2.0, 1.0]):
            stats = stepper.step([[1], [2], [3], [4]], [[3, 0], [4], [3, 3, 0], [1, 0]], scores)
        adapters = session.server.adapters
        found[critic] = (
            adapters["policy_1"].weights[:, :VOCABULARY],
            adapters[critic or "policy_1"].weights[:, VOCABULARY],
            {name: value for name, value in without_times(stats).items() if not isinstance(value, np.ndarray)},
        )
        assert adapters["critic_1"].version == (8 if critic else 0)  # two batches, two epochs, two minibatches
    for mine, other in zip(found[""][:2], found["critic_1"][:2], strict=True):
        np.testing.assert_allclose(other, mine, rtol=1e-9, atol=1e-12)
    assert found["critic_1"][2] == pytest.approx(found[""][2])


def test_the_critic_learns_at_its_own_rate_and_the_policys_loss_leaves_values_out():
    session = policy_session()
    session.create_adapter("critic_1", kind="critic")
    config = PpoConfig(batch_size=2, mini_batch_size=2, ppo_epochs=1, cliprange_value=0.3, max_grad_norm=0.7)
    PpoStepper(session, config, critic="critic_1", critic_learning_rate=0.5).step([[1], [2]], [[3], [4]], [1.0, 0.0])
    losses = [call["loss"] for kind, call in session.server.calls if kind == "forward_backward"]
    assert [type(loss) for loss in losses] == [t.PpoLoss, t.ValueLoss]
    assert (losses[0].vf_coef, losses[1].cliprange_value) == (0.0, 0.3)
    steps = [(c["adamw"].learning_rate, c["max_grad_norm"]) for kind, c in session.server.calls if kind == "optim_step"]
    assert sorted(steps) == [(config.learning_rate, 0.7), (0.5, 0.7)]


def test_a_run_makes_the_critic_from_a_reward_adapter_and_a_policy_without_a_head(config):
    server = ToyServer()
    _, shown = run(config, server)
    assert "made critic_1 from good" in shown
    assert server.begun_from == "good"
    assert server.adapters["critic_1"].version == server.adapters["policy_1"].version == 6 * 8
    assert not server.adapters["policy_1"].value_head
    assert sorted(server.checkpoints) == ["/root/run/checkpoint-000006", "/root/run/checkpoint-000006-critic"]


@pytest.mark.parametrize("meanwhile", ["nothing", "server restarted"])
@pytest.mark.parametrize("exact", [False, True])
def test_a_resumed_run_is_the_run_that_was_never_interrupted(config, tmp_path, meanwhile, exact):
    undisturbed = dataclasses.replace(config, output_dir=str(tmp_path / "undisturbed"))
    server, other = ToyServer(exact=exact), ToyServer(exact=exact)
    run(undisturbed, other)
    config = dataclasses.replace(config, save_every=2)
    asked = iter(range(100))
    run(config, server, stop=lambda: next(asked) >= 3)
    if meanwhile == "server restarted":
        server.restart()
    _, shown = run(config, server)
    assert "critic_1 " + ("was read from" if meanwhile != "nothing" else "is on the server as it was left") in shown
    assert lines(config) == lines(undisturbed)
    for name in ("policy_1", "critic_1"):
        np.testing.assert_array_equal(server.adapters[name].weights, other.adapters[name].weights)


def test_what_cannot_be_the_critic_is_refused_by_name(config):
    server = ToyServer()
    with pytest.raises(ConfigError, match=r"critic\.name: 'critic_1' is not on the server; .* create: true"):
        run(dataclasses.replace(config, critic=CriticConfig(create=False)), server)
    server.adapters["critic_1"] = ToyAdapter("critic_1", 1.0)
    with pytest.raises(ConfigError, match=r"critic\.name: 'critic_1' is a policy adapter, not a critic"):
        run(config, server)
    run(dataclasses.replace(config, critic=None, steps=1, resume="never"), ToyServer())
    assert load_state(config.output_path).critic is None
    with pytest.raises(ConfigError, match=r"critic: .* holds a run without one; .* resume: never"):
        run(config, ToyServer())


def test_only_ppo_has_a_critic(config):
    with pytest.raises(ConfigError, match="critic: is PPO's, and grpo has none"):
        dataclasses.replace(config, algorithm="grpo")
    with pytest.raises(ConfigError, match=r"critic\.name: 'policy_1' is the policy's name"):
        dataclasses.replace(config, critic=CriticConfig(name="policy_1"))
