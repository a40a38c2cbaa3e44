"""One PPO step: against recorded steps of TRL 0.11.4, and on a toy policy."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trainer.toy import ToyServer, policy_session

from onebase.client import types as t
from onebase.client.errors import AbortedError
from onebase.trainer import PpoConfig, PpoStepper
from onebase.trainer.stats import reward_stats

TRL = json.loads((Path(__file__).parents[1] / "fixtures" / "trl_steps.json").read_text())
CASES = TRL["cases"]


class RecordedSession:
    """Answers as TRL's model did, and checks that it is asked to train on what TRL trained on."""

    def __init__(self, config):
        self.config = config
        self.version = 0
        self.optim_steps = 0
        self.pending = 0

    def start(self, step):
        self.step, self.passes = step, iter(step["passes"])

    def score(self, sequences, *, rewards, reference, outputs, ppo_adapter_name, critic):
        assert critic == ""
        assert set(outputs) == {"logprobs", "reference_logprobs", "values"}
        assert [list(sequence.completion) for sequence in sequences] == self.step["responses"]
        return [
            t.Score(
                logprobs=np.array(self.step["logprobs"][row], dtype=np.float32),
                reference_logprobs=np.array(self.step["reference_logprobs"][row], dtype=np.float32),
                values=np.array(self.step["values"][row], dtype=np.float32),
                entropy=None,
                scores={},
                reward=0.0,
                completion_tokens=None,
                eos_appended={},
                policy=t.AdapterVersion("policy_1", self.version),
                reference=t.AdapterVersion("base", 0),
            )
            for row in range(len(sequences))
        ]

    def forward_backward(self, sequences, loss, *, adapter, denominator, expected_version, expected_pending):
        assert expected_version == self.version
        assert expected_pending == self.pending
        self.pending += 1
        recorded = next(self.passes)
        accumulated = self.config.gradient_accumulation_steps
        for sequence, row, advantages, returns, values in zip(
            sequences,
            recorded["rows"],
            recorded["advantages"],
            recorded["returns"],
            recorded["old_values"],
            strict=True,
        ):
            mask = np.array(self.step["masks"][row] if self.step["masks"] else [1] * len(returns), dtype=bool)
            assert sequence.mask.tolist() == mask.tolist()
            assert list(sequence.prompt) == self.step["queries"][row]
            close(sequence.advantages[mask], np.array(advantages)[mask])
            close(sequence.returns[mask], np.array(returns)[mask])
            close(sequence.old_values[mask], np.array(values)[mask])
            close(sequence.old_logprobs, self.step["logprobs"][row])
            assert sequence.advantages.dtype == np.float32
        count = sum(int(sequence.mask.sum()) for sequence in sequences)
        assert denominator == (None if accumulated == 1 else count * accumulated)
        # A server divides its losses by the denominator that it is given.
        metrics = {
            name: value / accumulated if name.startswith("loss/") else value
            for name, value in recorded["metrics"].items()
        }
        return t.ForwardBackward(t.AdapterVersion("policy_1", self.version), metrics, (), (), (), False, 1)

    def optim_step(self, adamw, *, max_grad_norm, adapter, expected_version, expected_pending):
        assert expected_pending == self.pending == self.config.gradient_accumulation_steps
        self.pending = 0
        assert adamw == t.AdamW(learning_rate=self.config.learning_rate)
        self.version += 1
        self.optim_steps += 1
        return t.OptimStep(t.AdapterVersion("policy_1", self.version), 1.0, 1)


class RecordedOrder:
    """Stands in for a generator: gives TRL's permutations."""

    def start(self, step):
        self.orders = iter(step["orders"])

    def permutation(self, count):
        return np.array(next(self.orders))


def close(found, expected):
    """Within 1e-5 of the largest magnitude."""
    scale = float(np.max(np.abs(expected), initial=0.0))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(scale, 1e-6))


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_trl(name):
    config = PpoConfig(**CASES[name]["config"])
    session, order = RecordedSession(config), RecordedOrder()
    stepper = PpoStepper(session, config, rng=order)
    passes = 0
    for step in CASES[name]["steps"]:
        session.start(step)
        order.start(step)
        stats = stepper.step(step["queries"], step["responses"], step["scores"], step["masks"])
        for key, expected in step["stats"].items():
            close(stats[key], expected)
        assert stepper.kl_coef == pytest.approx(step["next_kl_coef"], rel=1e-6)
        assert next(session.passes, None) is None  # every recorded pass was made
        passes += len(step["passes"])
    assert session.optim_steps == passes // config.gradient_accumulation_steps


def test_the_recorded_cases_show_what_they_are_for():
    """Guards the fixtures: the early stop stops, clipping clips, the adaptive coefficient moves."""
    early = CASES["early_stop"]
    assert len(early["steps"][0]["passes"]) < early["config"]["ppo_epochs"]
    assert any(step["stats"]["ppo/policy/clipfrac"] > 0 for step in CASES["defaults"]["steps"])
    assert CASES["accumulation"]["steps"][0]["stats"]["ppo/mean_scores"] <= 0.6
    assert early["steps"][0]["next_kl_coef"] != 0.2
    assert CASES["masked"]["steps"][0]["next_kl_coef"] == 0.2


def test_the_names_of_the_stats_are_trls():
    session = policy_session()
    config = PpoConfig(batch_size=2, mini_batch_size=2, ppo_epochs=1)
    stats = PpoStepper(session, config).step([[1], [2]], [[3, 0], [4]], [0.5, -0.5])
    assert sorted(stats | reward_stats(np.array([0.5, -0.5]))) == TRL["stats_names"]


@given(
    shape=st.sampled_from([(6, 1, 1), (6, 2, 1), (6, 3, 2), (6, 2, 3), (6, 6, 1), (4, 2, 2)]),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=30)
def test_every_epoch_trains_on_every_row_once(shape, epochs, seed):
    batch, mini, accumulate = shape
    config = PpoConfig(
        batch_size=batch, mini_batch_size=mini, gradient_accumulation_steps=accumulate, ppo_epochs=epochs
    )
    session = policy_session()
    stepper = PpoStepper(session, config, rng=np.random.default_rng(seed))
    stepper.step([[row] for row in range(batch)], [[1, 2]] * batch, np.zeros(batch))
    passes = [call["sequences"] for kind, call in session.server.calls if kind == "forward_backward"]
    assert all(len(rows) == mini for rows in passes)
    prompts = [row.prompt[0] for rows in passes for row in rows]
    for epoch in range(epochs):
        assert sorted(prompts[epoch * batch : (epoch + 1) * batch]) == list(range(batch))
    optim_steps = [kind for kind, _ in session.server.calls].count("optim_step")
    assert optim_steps * accumulate == len(passes)
    assert stepper.version == session.server.adapters["policy_1"].version == optim_steps


def test_accumulating_equal_minibatches_is_one_large_minibatch():
    def trained(**settings):
        session = policy_session()
        config = PpoConfig(batch_size=4, ppo_epochs=1, learning_rate=0.1, **settings)
        stats = PpoStepper(session, config).step([[1], [2], [3], [4]], [[1, 2, 3]] * 4, [1.0, 0.0, -1.0, 2.0])
        return session.server.adapters["policy_1"].weights, stats

    weights, stats = trained(mini_batch_size=4)
    others, other_stats = trained(mini_batch_size=1, gradient_accumulation_steps=4)
    np.testing.assert_allclose(others, weights, rtol=1e-9, atol=1e-12)
    for name in ("ppo/loss/policy", "ppo/loss/value", "ppo/loss/total"):
        assert other_stats[name] == pytest.approx(stats[name], rel=1e-6)


@pytest.mark.parametrize("losses", [{1}, {2}, {3}, {4}, {2, 3}, {3, 4, 5, 6}])
def test_gradients_that_a_restart_has_lost_are_made_again(losses):
    """`losses`: before which of the training calls, counting all of them, the server forgets what is pending."""

    def trained(forgets):
        session = policy_session()
        target, made = session.server.adapters["policy_1"], []

        def forgetting(call):
            def forgetful(*arguments, **named):
                made.append(call.__name__)
                if len(made) in forgets:
                    target.pending, target.gradients = 0, np.zeros_like(target.gradients)
                return call(*arguments, **named)

            return forgetful

        session.forward_backward = forgetting(session.forward_backward)
        session.optim_step = forgetting(session.optim_step)
        config = PpoConfig(batch_size=4, mini_batch_size=1, gradient_accumulation_steps=2, ppo_epochs=2)
        stats = PpoStepper(session, config).step([[1], [2], [3], [4]], [[1, 2, 3]] * 4, [1.0, 0.0, -1.0, 2.0])
        return target, {name: value for name, value in stats.items() if not name.startswith("time/")}, len(made)

    wanted, wanted_stats, calls = trained(set())
    found, stats, more_calls = trained(losses)
    assert found.weights.tobytes() == wanted.weights.tobytes()
    assert found.version == wanted.version == 4
    assert (more_calls > calls) == bool(losses - {1, 4})  # nothing is pending before the first call of a round
    for name, value in wanted_stats.items():
        np.testing.assert_array_equal(stats[name], value)


def test_the_loss_and_the_gradient_clip_are_the_configurations():
    session = policy_session()
    config = PpoConfig(
        batch_size=1,
        mini_batch_size=1,
        ppo_epochs=2,
        max_grad_norm=0.5,
        cliprange=0.1,
        vf_coef=0.7,
        ratio_threshold=3.0,
    )
    PpoStepper(session, config).step([[1]], [[2, 0]], [1.0])
    losses = [call["loss"] for kind, call in session.server.calls if kind == "forward_backward"]
    norms = [call["max_grad_norm"] for kind, call in session.server.calls if kind == "optim_step"]
    assert losses == [t.PpoLoss(cliprange=0.1, cliprange_value=0.2, vf_coef=0.7, ratio_threshold=3.0)] * 2
    assert norms == [0.5, 0.5]  # every step, not only the first


def test_a_response_of_one_token_is_trained_on():
    session = policy_session()
    stats = PpoStepper(session, PpoConfig(batch_size=1, mini_batch_size=1, ppo_epochs=1)).step([[1]], [[0]], [1.0])
    assert stats["tokens/responses_len_mean"] == 1.0
    assert np.isnan(stats["ppo/std_scores"])  # of one score, as torch has it
    assert np.isfinite(session.server.adapters["policy_1"].weights).all()


def test_another_trainer_of_the_same_policy_is_noticed():
    session = policy_session()
    forward_backward = session.forward_backward

    def overtaken(*args, **kwargs):
        session.server.adapters["policy_1"].version += 1
        return forward_backward(*args, **kwargs)

    session.forward_backward = overtaken
    with pytest.raises(AbortedError, match="version 1, not 0"):
        PpoStepper(session, PpoConfig(batch_size=1, mini_batch_size=1)).step([[1]], [[2]], [1.0])


def test_a_step_that_fails_leaves_the_controllers_as_they_were():
    session = policy_session()
    config = PpoConfig(batch_size=2, mini_batch_size=2, use_score_scaling=True)
    stepper = PpoStepper(session, config)
    session.forward_backward = lambda *_, **__: (_ for _ in ()).throw(AbortedError("no"))
    before = stepper.kl_coef, stepper.moments
    with pytest.raises(AbortedError):
        stepper.step([[1], [2]], [[2], [3]], [1.0, 2.0])
    assert (stepper.kl_coef, stepper.moments) == before


@pytest.mark.parametrize(
    ("queries", "responses", "scores", "masks", "message"),
    [
        ([[1]], [[1], [2]], [0, 0], None, "queries holds 1, but batch_size is 2"),
        ([[1], [1]], [[1]], [0, 0], None, "responses holds 1, but batch_size is 2"),
        ([[1], [1]], [[1], []], [0, 0], None, r"responses\[1\] is empty"),
        ([[1], [1]], [[1], [2]], [0], None, r"scores has shape \[1\]"),
        ([[1], [1]], [[1], [2]], [0, float("nan")], None, r"scores\[1\] is nan"),
        ([[1], [1]], [[1], [2]], [0, 0], [[1]], "response_masks holds 1"),
        ([[1], [1]], [[1], [2]], [0, 0], [[1], [1, 1]], r"response_masks\[1\] has shape \[2\], its response 1 tokens"),
        ([[1], [1]], [[1], [2]], [0, 0], [[1], [0]], r"response_masks\[1\] leaves out every token"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_name(queries, responses, scores, masks, message):
    stepper = PpoStepper(policy_session(ToyServer()), PpoConfig(batch_size=2, mini_batch_size=2))
    with pytest.raises(ValueError, match=message):
        stepper.step(queries, responses, scores, masks)
