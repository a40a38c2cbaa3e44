"""Drawing tokens. A draw depends on the row's own logits and on (seed, prompt, completion, position) alone.

Randomness is counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the uniform number of
a place is a function of its counter, so a completion does not depend on its neighbours, on batching, or on restarts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from onebase.server.jobs import Sampling


def uniform(seed: int, prompt_index: int, completion_index: int, position: int) -> float:
    """A uniform number in [0, 1) that belongs to one token of one completion."""
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, (prompt_index << 32) | completion_index], dtype=np.uint64)
    counter = np.array([position, 0, 0, 0], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=counter)).random())


def draw(logits: torch.Tensor, samplings: Sequence[Sampling], places: Sequence[tuple[int, int, int]]) -> list[int]:
    """The next token of each of B completions.

    Args:
        logits: float32 [B, vocabulary], -inf where a token may not come.
        samplings: B requests' parameters.
        places: B times (prompt index, completion index, position in the completion).

    Returns:
        B token ids; each depends on its own row, parameters and place alone. Of a row that is not finite, or in which
        no token may come, some token: an index past the end would end a GPU for everybody.
    """
    greedy = torch.argmax(logits, dim=-1).tolist()
    sampled = [i for i, sampling in enumerate(samplings) if sampling.temperature > 0]
    if not sampled:
        return greedy
    temperatures = torch.tensor([samplings[i].temperature for i in sampled], dtype=torch.float64)
    rows = logits if len(sampled) == len(samplings) else logits[sampled]
    probabilities = torch.softmax(rows.double() / temperatures.to(logits.device)[:, None], dim=-1)
    for row, i in zip(probabilities, sampled, strict=True):
        keep_probable(row, samplings[i])
    mass = torch.cumsum(probabilities, dim=-1)
    total = mass[:, -1:].contiguous()
    numbers = torch.tensor([uniform(samplings[i].seed, *places[i]) for i in sampled], dtype=torch.float64)
    chosen = torch.searchsorted(mass, numbers.to(logits.device)[:, None] * total, right=True)
    last = torch.searchsorted(mass, total)  # the last token with any mass: rounding must not go past it
    found = torch.minimum(chosen, last).clamp_(max=logits.shape[1] - 1)  # nothing is found among NaNs
    for i, token in zip(sampled, found[:, 0].tolist(), strict=True):
        greedy[i] = token
    return greedy


def keep_probable(probabilities: torch.Tensor, sampling: Sampling) -> None:
    """Zeroes, in place, what top_k, top_p and min_p drop, in that order; the most probable token always stays.

    Args:
        probabilities: [vocabulary], summing to 1.
        sampling: the request's parameters.
    """
    if sampling.top_k and sampling.top_k < probabilities.shape[0]:
        least = torch.topk(probabilities, sampling.top_k).values[-1]
        probabilities[probabilities < least] = 0.0
    if sampling.top_p < 1.0:
        ordered, index = torch.sort(probabilities, descending=True, stable=True)
        before = torch.cumsum(ordered, 0) - ordered
        dropped = before >= sampling.top_p * ordered.sum()
        dropped[0] = False
        probabilities[index[dropped]] = 0.0
    if sampling.min_p > 0.0:
        probabilities[probabilities < sampling.min_p * probabilities.max()] = 0.0
