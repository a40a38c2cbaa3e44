"""Memory: what a policy adds to a server, and what logprobs of a large vocabulary need."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from bench import Bench
from measure import Figure, exactly, peak_bytes, status_bytes
from models import model_dir, random_ids
from serving import served

from onebase.client import Client, connect
from onebase.client import types as t
from onebase.server.engine.heads import LmHead, token_logprobs

RANK = 8
WARM, MORE = 3, 16
"""Policies before the count begins, and policies that are counted."""
POSITIONS, VOCABULARY, HIDDEN = 1024, 131072, 64
MOMENTS = 2


def adapter_bytes_over_own(bench: Bench) -> Figure:
    """Resident memory of a server per added rank-8 policy, stepped once, over its parameters' and moments' bytes: 39M.

    16 policies on all seven linears with value heads, float32, through create, ForwardBackward and OptimStep.
    """
    del bench
    with served(model_dir("39m", "float32")) as server, connect(server.address) as client:
        for index in range(WARM):
            _train_new_policy(client, f"warm_{index}")
        before = status_bytes("VmRSS", server.pid)
        own = sum(_train_new_policy(client, f"policy_{index}") for index in range(MORE))
        added = status_bytes("VmRSS", server.pid) - before
    return exactly(added / own, MORE, {"added_bytes_each": added / MORE, "own_bytes_each": own / MORE})


def logprob_peak_over_full_logits_128k(bench: Bench) -> Figure:
    """Peak memory of our token logprobs over log_softmax of all logits: 1024 positions, vocabulary 131,072, fp32.

    `detail` has the same with gradients, forward and backward.
    """
    del bench
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        found = fresh.submit(_logprob_peaks).result()  # here the heap holds room that other cases left
    return exactly(found["our_bytes"] / found["full_bytes"], 1, found)


def _logprob_peaks() -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    embedding = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False).requires_grad_(False)
    head = LmHead(embedding, lambda logits: logits)
    targets = torch.randint(0, VOCABULARY, (POSITIONS,))

    def ours(hidden: torch.Tensor) -> torch.Tensor:
        return token_logprobs(head, hidden, targets, entropy=False)[0]

    def full(hidden: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(embedding(hidden).float(), -1).gather(1, targets[:, None])[:, 0]

    def peak(side: Callable[[torch.Tensor], torch.Tensor], *, gradients: bool) -> int:
        hidden = torch.randn(POSITIONS, HIDDEN, requires_grad=gradients)
        return peak_bytes(lambda: torch.autograd.backward(side(hidden).sum()) if gradients else side(hidden))

    with torch.no_grad():  # what libraries set up in a first call does not count
        token_logprobs(head, torch.randn(4, HIDDEN), targets[:4], entropy=False)
    return {
        "our_bytes": float(peak(ours, gradients=False)),
        "full_bytes": float(peak(full, gradients=False)),
        "with_gradients": peak(ours, gradients=True) / peak(full, gradients=True),
    }


def _train_new_policy(client: Client, name: str) -> int:
    """Makes a policy and one step with it; returns the bytes of its parameters and moments."""
    with client.open_session() as session:
        session.create_adapter(name, t.LoraSpec(rank=RANK, alpha=2.0 * RANK))
        session.set_active(name)
        prompt, completion = random_ids(1, 32)[0].numpy(), random_ids(1, 32, seed=1)[0].numpy()
        ones = np.ones(len(completion), dtype=np.float32)
        session.forward_backward(t.TrainingSequence(prompt, completion, -9 * ones, 0 * ones, ones, ones))
        session.optim_step(t.AdamW(learning_rate=1e-4))
    adapter = next(one for one in client.status().adapters if one.name == name)
    return (1 + MOMENTS) * adapter.parameter_count * 4
