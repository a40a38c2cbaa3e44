"""Losses are what torch's autograd makes of the same formulas on the same PEFT model, and DPO is TRL's.

Gradients are read off the weights: with an epsilon far above any gradient, Adam's first update is lr/eps times the
gradient, linear in it, so that the last digits of small gradients decide nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from oracle.fixtures import (
    FIXTURES,
    PEFT_WARNINGS,
    Weights,
    assert_close,
    assert_rows_close,
    assert_same_weights,
    saved_weights,
)
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from onebase.client import Client, Session
from onebase.client.types import (
    AdamW,
    CrossEntropyLoss,
    CustomLoss,
    DpoLoss,
    Floats,
    ForwardBackward,
    ImportanceSamplingLoss,
    Loss,
    PpoLoss,
    TrainingSequence,
    ValueLoss,
)
from onebase.client.types import Sequence as Plain

pytestmark = PEFT_WARNINGS

ADAMW = AdamW(learning_rate=3e4, eps=1e4)
"""Whose first update is 3 times the gradient."""

Formula = Callable[["Said", "Sent"], torch.Tensor]


@dataclass(frozen=True)
class Said:
    """What the PEFT model says of one completion, [t] each, with gradients; `logits` are [t, vocabulary]."""

    logits: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor


class Sent:
    """The arrays of a TrainingSequence as tensors."""

    def __init__(self, row: TrainingSequence) -> None:
        self.row = row

    def __getattr__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(getattr(self.row, name))


class Oracle:
    """The fixture's base, policy and value head in PEFT and torch."""

    def __init__(self) -> None:
        base = AutoModelForCausalLM.from_pretrained(FIXTURES / "base")
        self.model = PeftModel.from_pretrained(base, FIXTURES / "policy", is_trainable=True).eval()
        head = load_file(FIXTURES / "policy" / "value_head.safetensors")
        self.weight, self.bias = (head[f"v_head.summary.{name}"].requires_grad_() for name in ("weight", "bias"))

    def says(self, row: TrainingSequence) -> Said:
        prompt = len(row.prompt)
        ids = torch.tensor([[*row.prompt, *row.completion]])
        out = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        logits = out.logits[0, prompt - 1 : -1]
        distribution = torch.distributions.Categorical(logits=logits)
        states = out.hidden_states[-1][0, prompt - 1 : -1]
        values = (states @ self.weight.T + self.bias)[:, 0]
        return Said(logits, distribution.log_prob(ids[0, prompt:]), distribution.entropy(), values)

    def step(self, loss: torch.Tensor, adamw: AdamW) -> Weights:
        """The weights after torch's own AdamW, under the names of the adapter's files."""
        lora = {name.replace(".default", ""): p for name, p in self.model.named_parameters() if p.requires_grad}
        named = {**lora, "v_head.summary.weight": self.weight, "v_head.summary.bias": self.bias}
        for parameter in named.values():
            parameter.grad = torch.zeros_like(parameter)  # as the server: what a loss does not reach gets zeros
        loss.backward()
        optimizer = torch.optim.AdamW(
            named.values(), adamw.learning_rate, eps=adamw.eps, weight_decay=adamw.weight_decay
        )
        optimizer.step()
        return {name: parameter.detach().numpy() for name, parameter in named.items()}


@pytest.fixture
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture
def session(client: Client) -> Iterator[Session]:
    """A session that holds the lease of a fresh copy of the policy."""
    client.load_adapter("loss", "policy", kind="policy")
    with client.open_session("loss") as session:
        yield session
    client.delete_adapter("loss")


def sequences(count: int = 6) -> list[TrainingSequence]:
    """Random ones, some of whose tokens do not count; a row's weights are not 1."""
    random = np.random.default_rng(7)
    rows = []
    for index in range(count):
        prompt, length = 2 + index % 3, 3 + 2 * index
        mask = random.random(length) < 0.8
        mask[0] = True
        ids = random.integers(4, 100, prompt + length).tolist()
        rows.append(
            TrainingSequence(ids[:prompt], ids[prompt:], mask=mask, weights=np.float32(random.uniform(0.5, 2, length)))
        )
    return rows


def with_arrays(rows: Sequence[TrainingSequence], oracle: Oracle, *names: str) -> list[TrainingSequence]:
    """The sequences with arrays of these names: old numbers and the reference's lie around what the model says now."""
    random = np.random.default_rng(8)
    found = []
    for row in rows:
        with torch.no_grad():
            said = oracle.says(row)

        def noise(deviation: float, length: int = len(row.completion)) -> NDArray[np.float32]:
            return np.float32(random.normal(0, deviation, length))

        arrays = {
            "old_logprobs": said.logprobs.numpy() + noise(0.3),
            "reference_logprobs": said.logprobs.numpy() + noise(0.5),
            "old_values": said.values.numpy() + noise(0.3),
            "advantages": noise(1.0),
            "returns": said.values.numpy() + noise(0.5),
        }
        found.append(replace(row, **{name: arrays[name] for name in names}))
    return found


def mean_of_tokens(oracle: Oracle, rows: Sequence[TrainingSequence], formula: Formula) -> torch.Tensor:
    """The formula's weighted sum over the tokens that count, divided by their number."""
    total = torch.zeros(())
    for row in rows:
        sent = Sent(row)
        terms = formula(oracle.says(row), sent) * sent.weights
        total = total + terms[sent.mask].sum()
    return total / sum(int(row.mask.sum()) for row in rows if row.mask is not None)


def check(
    session: Session, root: Path, oracle: Oracle, rows: Sequence[TrainingSequence], loss: Loss, wanted: torch.Tensor
) -> ForwardBackward:
    """The server's loss and gradients are those of `wanted`."""
    passed = session.forward_backward(rows, loss)
    assert_close(passed.metrics["loss/total"], wanted.item(), "loss/total")
    session.optim_step(ADAMW)
    saved = session.save_adapter(str(root / "saved-loss"), overwrite=True)
    before = saved_weights(FIXTURES / "policy")
    after = oracle.step(wanted, ADAMW)
    assert_same_weights(saved_weights(saved.path), after)
    assert all(np.abs(after[name] - before[name]).max() > 1e-4 for name in before if "lora_A" in name)
    return passed


def clipped_surrogate(said: Said, sent: Sent, low: float = 0.2, high: float = 0.2) -> torch.Tensor:
    ratio = torch.exp(said.logprobs - sent.old_logprobs)
    return -torch.min(sent.advantages * ratio, sent.advantages * ratio.clip(1 - low, 1 + high))


def clipped_values(said: Said, sent: Sent, clip: float = 0.2) -> torch.Tensor:
    close = sent.old_values + (said.values - sent.old_values).clip(-clip, clip)
    return 0.5 * torch.max((said.values - sent.returns) ** 2, (close - sent.returns) ** 2)


PPO_ARRAYS = ("old_logprobs", "advantages", "old_values", "returns")


def test_cross_entropy_is_torchs_and_so_is_a_step_with_it(session: Session, root: Path, oracle: Oracle) -> None:
    rows = [replace(row, weights=None, mask=None) for row in sequences()]
    adamw = AdamW(learning_rate=1e-2, eps=1e-3, weight_decay=0.1)
    logits = torch.cat([oracle.says(row).logits for row in rows])
    wanted = functional.cross_entropy(logits, torch.cat([torch.tensor(row.completion) for row in rows]))

    passed = session.forward_backward(rows, CrossEntropyLoss())
    session.optim_step(adamw)
    saved = session.save_adapter(str(root / "saved-cross-entropy"))

    assert_close(passed.metrics["loss/cross_entropy"], wanted.item())
    assert_close(passed.metrics["loss/total"], wanted.item())
    assert_close(passed.metrics["perplexity"], wanted.exp().item())
    assert_same_weights(saved_weights(saved.path), oracle.step(wanted, adamw))


def test_cross_entropy_of_weighted_tokens(session: Session, root: Path, oracle: Oracle) -> None:
    rows = sequences()
    check(session, root, oracle, rows, CrossEntropyLoss(), mean_of_tokens(oracle, rows, lambda said, _: -said.logprobs))


def test_importance_sampling(session: Session, root: Path, oracle: Oracle) -> None:
    rows = with_arrays(sequences(), oracle, "old_logprobs", "advantages")

    def formula(said: Said, sent: Sent) -> torch.Tensor:
        return -sent.advantages * torch.exp(said.logprobs - sent.old_logprobs)

    passed = check(session, root, oracle, rows, ImportanceSamplingLoss(), mean_of_tokens(oracle, rows, formula))
    assert passed.metrics["loss/policy"] == passed.metrics["loss/total"]
    difference = np.concatenate([(sent - now)[row.mask] for row, sent, now in _pairs(rows, passed.logprobs)])
    assert_close(passed.metrics["policy/policykl"], difference.mean(), scale=1e-1)
    assert_close(passed.metrics["policy/approxkl"], 0.5 * (difference**2).mean())


def _pairs(
    rows: Sequence[TrainingSequence], logprobs: Sequence[Floats]
) -> Iterator[tuple[TrainingSequence, Floats, Floats]]:
    for row, now in zip(rows, logprobs, strict=True):
        assert row.old_logprobs is not None
        yield row, np.float64(row.old_logprobs), np.float64(now)


@pytest.mark.parametrize(
    "loss",
    [
        PpoLoss(cliprange=0.1, cliprange_high=0.4, vf_coef=0.0),
        PpoLoss(vf_coef=0.5, kl_coef=0.3),
        PpoLoss(vf_coef=0.0, entropy_coef=0.7),
        PpoLoss(0.15, 0.25, 0.5, cliprange_high=0.3, kl_coef=0.2, entropy_coef=0.05),
    ],
    ids=["asymmetric clip", "kl", "entropy", "all"],
)
def test_ppo_with_asymmetric_clip_kl_and_entropy(session: Session, root: Path, oracle: Oracle, loss: PpoLoss) -> None:
    names = (*PPO_ARRAYS, "reference_logprobs") if loss.kl_coef else PPO_ARRAYS
    rows = with_arrays(sequences(), oracle, *names)

    def kl(said: Said, sent: Sent) -> torch.Tensor:  # as GRPOTrainer has it
        per_token = sent.reference_logprobs - said.logprobs
        return torch.exp(per_token) - per_token - 1

    def formula(said: Said, sent: Sent) -> torch.Tensor:
        high = loss.cliprange if loss.cliprange_high is None else loss.cliprange_high
        total = clipped_surrogate(said, sent, loss.cliprange, high) - loss.entropy_coef * said.entropy
        if loss.vf_coef:
            total = total + loss.vf_coef * clipped_values(said, sent, loss.cliprange_value)
        return total + loss.kl_coef * kl(said, sent) if loss.kl_coef else total

    passed = check(session, root, oracle, rows, loss, mean_of_tokens(oracle, rows, formula))
    unweighted = [replace(row, weights=np.ones_like(row.weights)) for row in rows]
    fresh = Oracle()
    with torch.no_grad():
        assert_rows_close(passed.entropy, [fresh.says(row).entropy.numpy() for row in rows], "entropy")
        entropy = mean_of_tokens(fresh, unweighted, lambda said, _: said.entropy)
        assert_close(passed.metrics["policy/entropy"], entropy.item())
        if loss.kl_coef:
            assert_close(passed.metrics["policy/kl"], mean_of_tokens(fresh, unweighted, kl).item())
        else:
            assert "policy/kl" not in passed.metrics


def test_the_value_loss_alone_needs_no_logits(session: Session, root: Path, oracle: Oracle) -> None:
    rows = with_arrays(sequences(), oracle, "old_values", "returns")
    wanted = mean_of_tokens(oracle, rows, lambda said, sent: clipped_values(said, sent, 0.3))
    passed = check(session, root, oracle, rows, ValueLoss(cliprange_value=0.3), wanted)
    assert passed.logprobs == passed.entropy == ()
    assert_rows_close(passed.values, [Oracle().says(row).values.detach().numpy() for row in rows], "values")
    assert 0 < passed.metrics["val/clipfrac"] < 1


def test_a_custom_loss_with_ppos_derivatives_is_ppo(
    client: Client, session: Session, root: Path, oracle: Oracle
) -> None:
    rows = with_arrays(sequences(), oracle, *PPO_ARRAYS)
    loss = PpoLoss(vf_coef=0.5, entropy_coef=0.3)

    def formula(said: Said, sent: Sent) -> torch.Tensor:
        surrogate = clipped_surrogate(said, sent) + loss.vf_coef * clipped_values(said, sent)
        return surrogate - loss.entropy_coef * said.entropy

    count = sum(int(row.mask.sum()) for row in rows if row.mask is not None)
    plain = [Plain(row.prompt, row.completion) for row in rows]
    seen = session.score(plain, outputs=["logprobs", "values", "entropy"])
    sent = []
    for row, score in zip(rows, seen, strict=True):
        numbers = [
            torch.from_numpy(np.array(a)).requires_grad_() for a in (score.logprobs, score.entropy, score.values)
        ]
        said, given = Said(torch.zeros(0), *numbers), Sent(row)
        (formula(said, given) * given.weights)[given.mask].sum().div(count).backward()
        gradients = [number.grad.numpy() for number in numbers]
        sent.append(
            TrainingSequence(
                row.prompt,
                row.completion,
                logprob_gradients=gradients[0],
                entropy_gradients=gradients[1],
                value_gradients=gradients[2],
            )
        )
    session.forward_backward(sent, CustomLoss(), expected_version=client.adapter("loss").version)
    session.optim_step(ADAMW)
    saved = session.save_adapter(str(root / "saved-custom"))
    assert_same_weights(saved_weights(saved.path), oracle.step(mean_of_tokens(oracle, rows, formula), ADAMW))

    session.load_adapter("loss", "policy", replace=True)
    session.forward_backward(rows, loss)
    session.optim_step(ADAMW)
    ours = session.save_adapter(str(root / "saved-custom-ppo"))
    assert_same_weights(saved_weights(saved.path), saved_weights(ours.path))


# -------------------------------------------------------------------------------------------------------- DPO


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_trls(session: Session, root: Path, oracle: Oracle, smoothing: float) -> None:
    rows = [replace(row, weights=None) for row in with_arrays(sequences(6), oracle, "reference_logprobs")]
    loss = DpoLoss(beta=0.3, label_smoothing=smoothing)
    wanted, metrics = trl_dpo(oracle, rows, loss)

    passed = check(session, root, oracle, rows, loss, wanted)

    names = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
    for name in (*names, "logps/chosen", "logps/rejected"):
        assert_close(passed.metrics[name], metrics[name], name)
    assert_close(passed.metrics["policy/entropy"], metrics["entropy"], "entropy")
    assert passed.metrics["loss/dpo"] == passed.metrics["loss/total"]


def trl_dpo(oracle: Oracle, rows: Sequence[TrainingSequence], loss: DpoLoss) -> tuple[torch.Tensor, dict[str, float]]:
    """TRL's DPOTrainer on these pairs: its loss, with gradients, and the means of its metrics.

    Pairs go through one by one. Its "sigmoid" has no label smoothing now, but "aot", which sorts pairs first and has
    it, is the same for a single pair.
    """
    from trl import DPOTrainer

    metrics: dict[str, list[float]] = defaultdict(list)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x, unwrap_model=lambda x: x
        ),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["aot" if loss.label_smoothing else "sigmoid"],
        loss_weights=[1.0],
        beta=loss.beta,
        label_smoothing=loss.label_smoothing,
        use_weighting=False,
        _metrics={"train": metrics},
        _total_train_tokens=0,
        _tp_size=1,
    )

    def model(input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> SimpleNamespace:
        """The PEFT model with what TRL's fused head gives: numbers of every token but the first, [2, T - 1]."""
        logits = oracle.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits[:, :-1]
        distribution = torch.distributions.Categorical(logits=logits)
        kept = labels[:, 1:] != -100
        return SimpleNamespace(
            log_probs=torch.where(kept, distribution.log_prob(input_ids[:, 1:]), 0.0),
            entropy=distribution.entropy(),
            mean_logits=logits.mean(-1),
            is_top1=logits.argmax(-1) == input_ids[:, 1:],
        )

    losses, entropies = [], []
    for chosen, rejected in zip(rows[0::2], rows[1::2], strict=True):
        pair = (chosen, rejected)
        width = max(len(row.prompt) + len(row.completion) for row in pair)
        inputs: dict[str, Any] = {
            "input_ids": torch.zeros(2, width, dtype=torch.long),
            "completion_mask": torch.zeros(2, width, dtype=torch.long),
            "attention_mask": torch.ones(2, width, dtype=torch.long),
        }
        for index, row in enumerate(pair):
            start, stop = len(row.prompt), len(row.prompt) + len(row.completion)
            inputs["input_ids"][index, :stop] = torch.tensor([*row.prompt, *row.completion])
            inputs["completion_mask"][index, start:stop] = torch.from_numpy(row.mask).long()
        counted = [float(row.reference_logprobs[row.mask].sum()) for row in pair]
        inputs |= {"ref_chosen_logps": torch.tensor(counted[:1]), "ref_rejected_logps": torch.tensor(counted[1:])}
        losses.append(DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False))
        entropies.append((metrics["entropy"][-1], sum(int(row.mask.sum()) for row in pair)))
    found = {name: float(np.mean(numbers)) for name, numbers in metrics.items()}
    found["entropy"] = sum(mean * count for mean, count in entropies) / sum(count for _, count in entropies)
    return torch.stack(losses).mean(), found
