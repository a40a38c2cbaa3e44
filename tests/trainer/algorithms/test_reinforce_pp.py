"""REINFORCE++ against OpenRLHF's formulas, written in torch from its publication.

OpenRLHF itself cannot be installed here, so what is compared with is its arithmetic, not its trainer: Hu 2025
(arXiv:2501.03262), and of OpenRLHF 0.8 `compute_reward` (models/utils.py), `get_cumulative_returns` and the
normalization at the end of `make_experience_batch` (trainer/ppo_utils/experience_maker.py), and `PolicyLoss`
(models/loss.py) with token_level_loss.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from trainer.toy import VOCABULARY, policy_session

from onebase.client import types as t
from onebase.trainer import ReinforcePpConfig, ReinforcePpStepper
from onebase.trainer.advantages import token_rewards
from onebase.trainer.algorithms.reinforce_pp import normalized_returns

LENGTHS = np.array([3, 1, 5, 4])
MASK = np.arange(5) < LENGTHS[:, None]
TOKENS = arrays(np.float64, (4, 5), elements=st.floats(-3, 3))


def openrlhf_advantages(scores, logprobs, reference, mask, kl_coef, gamma, clip):
    """compute_reward with kl_estimator k1, get_cumulative_returns, and the batch's normalization."""
    scores, logprobs, reference = (torch.tensor(array) for array in (scores, logprobs, reference))
    action_mask = torch.tensor(mask)
    kl = (logprobs - reference) * action_mask
    r = scores.clamp(min=-clip, max=clip)
    kl_reward = -kl_coef * kl
    eos_indices = action_mask.size(1) - 1 - action_mask.long().fliplr().argmax(dim=1, keepdim=True)
    last_reward = torch.zeros_like(kl).scatter_(dim=1, index=eos_indices, src=r.unsqueeze(1).to(kl.dtype))
    rewards = last_reward + kl_reward
    response_length = rewards.size(1)
    returns = torch.zeros_like(rewards)
    cumulative_return = torch.zeros(rewards.size(0), dtype=rewards.dtype)
    rewards = action_mask * rewards
    for step in reversed(range(response_length)):
        cumulative_return = rewards[:, step] + gamma * cumulative_return
        returns[:, step] = cumulative_return
    num_actions = action_mask.sum()
    mean = (returns * action_mask).sum() / num_actions
    var = ((returns - mean).pow(2) * action_mask).sum() / num_actions
    rstd = var.clamp(min=1e-8).rsqrt()
    return ((returns - mean) * rstd * action_mask).numpy()


@given(TOKENS, TOKENS, arrays(np.float64, 4, elements=st.floats(-20, 20)), st.floats(0, 1), st.floats(0.5, 1))
def test_advantages_are_openrlhfs(logprobs, reference, scores, kl_coef, gamma):
    expected = openrlhf_advantages(scores, logprobs, reference, MASK, kl_coef, gamma, clip=10.0)
    rewards = token_rewards(np.clip(scores, -10, 10), logprobs, reference, MASK, kl_coef).rewards
    np.testing.assert_allclose(normalized_returns(rewards, MASK, gamma), expected, rtol=1e-6, atol=1e-6)


@given(TOKENS)
def test_advantages_have_mean_nothing_over_the_tokens_that_count(rewards):
    advantages = normalized_returns(rewards, MASK, 1.0)
    assert advantages[MASK].mean() == pytest.approx(0, abs=1e-6)
    assert not advantages[~MASK].any()


def test_a_step_is_openrlhfs():
    """Advantages in, loss and gradient out: PolicyLoss at a ratio of 1, where the clip is idle."""
    session = policy_session()
    adapter = session.server.adapters["policy_1"]
    adapter.weights = np.random.default_rng(1).normal(size=adapter.weights.shape)
    logits = session.server.reference + adapter.weights[:, :VOCABULARY]
    config = ReinforcePpConfig(
        batch_size=4,
        mini_batch_size=4,
        kl_coef=0.3,
        score_clip=2.0,
        gamma=0.9,
        learning_rate=0.1,
        max_grad_norm=None,
    )
    queries, responses = [[1], [2], [3], [4]], [[3, 2, 0], [4], [1, 1, 1, 1, 0], [5, 5, 3, 0]]
    scores = np.array([3.0, -1.0, 0.5, 1.5])
    scored = session.score(
        [t.Sequence(query, response) for query, response in zip(queries, responses, strict=True)],
        outputs=("logprobs", "reference_logprobs"),
    )
    logprobs, reference = (
        np.array(
            [
                np.pad(getattr(score, name).astype(np.float64), (0, 5 - n))
                for score, n in zip(scored, LENGTHS, strict=True)
            ]
        )
        for name in ("logprobs", "reference_logprobs")
    )
    gradients = []
    optim_step = session.optim_step
    session.optim_step = lambda *a, **k: (gradients.append(adapter.gradients.copy()), optim_step(*a, **k))[1]
    stats = ReinforcePpStepper(session, config).step(queries, responses, scores)
    expected = openrlhf_advantages(scores, logprobs, reference, MASK, 0.3, 0.9, clip=2.0)
    np.testing.assert_allclose(stats["reinforce_pp/advantages"], expected[MASK], rtol=1e-5, atol=1e-6)

    weights = torch.tensor(logits, requires_grad=True)
    table = torch.log_softmax(weights, dim=-1)
    rows = [([q[-1], *r[:-1]], r) for q, r in zip(queries, responses, strict=True)]
    new = torch.stack([torch.nn.functional.pad(table[a, b], (0, 5 - len(b))) for a, b in rows])
    ratio = (new - new.detach()).exp()
    advantages, mask = torch.tensor(expected), torch.tensor(MASK)
    loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    loss = (loss * mask).sum() / mask.sum()
    loss.backward()
    assert stats["reinforce_pp/loss/total"] == pytest.approx(loss.item(), abs=1e-6)
    np.testing.assert_allclose(gradients[0][:, :-1], weights.grad.numpy(), rtol=1e-4, atol=1e-6)
