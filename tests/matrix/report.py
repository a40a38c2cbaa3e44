"""The matrix's results: `tests/matrix.json` for programs, `docs/architectures.md` for people."""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matrix.compare import KINDS, TOLERANCE, Outcome

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests" / "matrix.json"
PAGE = ROOT / "docs" / "architectures.md"

LIBRARIES = ("transformers", "peft", "torch")

Entry = dict[str, Any]


def entry(untied: Outcome, tied: Outcome) -> Entry:
    """What the record says of an architecture.

    Raises:
        ValueError: untied and tied embeddings fare differently, or numbers differ and the model was not refused.
    """
    if untied.status != tied.status or tied.status == "different":
        raise ValueError(f"{tied.architecture} is neither proven nor refused: untied {untied}, tied {tied}")
    if tied.reason is not None:
        return {"class": tied.architecture, "status": "refused", "reason": tied.reason}
    found = {"untied": untied.differences, "tied": tied.differences}
    largest = {kind: _largest(found[one][kind] for one in found) for kind in KINDS}
    return {
        "class": tied.architecture,
        "status": "proven",
        "exact": untied.exact and tied.exact,
        "largest_difference": {kind: _rounded(x) for kind, x in largest.items()}
        | {"overall": _rounded(_largest(largest.values()))},
        **{name: {kind: _rounded(x) for kind, x in one.items()} for name, one in found.items()},
    }


def record(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """The whole record."""
    return {
        "versions": {name: importlib.metadata.version(name).partition("+")[0] for name in LIBRARIES},
        "tolerance": TOLERANCE,
        "architectures": dict(entries),
    }


def read() -> dict[str, Any]:
    """The record that is committed."""
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def page(results: Mapping[str, Any]) -> str:
    """The page for people."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    entries = results["architectures"]
    proven = {name: one for name, one in entries.items() if one["status"] == "proven"}
    refused = {name: one for name, one in entries.items() if one["status"] == "refused"}
    inexact = "; ".join(name for name, one in proven.items() if not one["exact"])
    largest = max(float(one["largest_difference"]["overall"]) for one in proven.values())
    rows = [
        f"| {name} | `{one['class']}` | " + " | ".join(_cell(one, kind) for kind in KINDS) + " |"
        for name, one in proven.items()
    ]
    reasons = [f"| {name} | `{one['class']}` | {_cause(one)} |" for name, one in refused.items()]
    return PAGE_TEXT.format(
        versions=versions,
        tolerance=f"{results['tolerance']:.0e}",
        proven=len(proven),
        refused=len(refused),
        largest=f"{largest:.0e}",
        inexact=inexact,
        rows="\n".join(rows),
        reasons="\n".join(reasons),
    )


def write(results: Mapping[str, Any]) -> None:
    """Writes both files."""
    RECORD.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(results), encoding="utf-8")


def _largest(found: Any) -> float | None:
    return max((x for x in found if x is not None), default=None)


def _rounded(x: float | None) -> float | None:
    """One significant digit, rounded up: a difference is never larger than what is said."""
    if not x:
        return x
    unit = 10.0 ** math.floor(math.log10(x))
    return float(f"{math.ceil(x / unit) * unit:.0e}")


def _cell(one: Entry, kind: str) -> str:
    if one["largest_difference"][kind] is None:
        return "–"
    return f"{one['untied'][kind]:.0e} / {one['tied'][kind]:.0e}"


def _cause(one: Entry) -> str:
    """The reason without its common beginning."""
    reason: str = one["reason"].partition("run it right: ")[2] or one["reason"]
    return reason.replace("|", "\\|")


PAGE_TEXT = """\
# Architectures

A base is served if its numbers were shown to be those of transformers, and refused by name if not. `make matrix` makes
this page, and [tests/matrix.json](../tests/matrix.json) for programs; the tests compare what is written there with what
the engine does today.

{proven} architectures are proven and {refused} refused, with {versions}. The largest difference of all is {largest} of
the largest magnitude; {tolerance} is allowed.

## What is compared

Each architecture is a small random model with everything that makes it what it is: windows of 8 tokens and sequences
of up to 53, caps and multipliers that bite, biases and norms away from 0 and 1. On one side plain transformers and
PEFT, eager, one sequence at a time; on the other the engine, loaded as `onebase serve` loads it, in steps so small that
prompts come in chunks and training in micro-batches. Each number is the largest difference, relative to the largest
magnitude of its kind, in float32:

* **generate**: greedy completions of base and policy, side by side in the key-value cache, against transformers'
  `generate` without a cache: the same tokens, and their logprobs.
* **logprob**: logprobs and entropies of the base (the reference) and of a policy by PEFT, and the policy's values.
* **reward**: a SEQ_CLS adapter by PEFT on `AutoModelForSequenceClassification`. A dash: transformers has none for this
  architecture, so there is nothing to compare with, and TRL's RewardTrainer, which needs it, makes no such reward.
* **train**: one pass of the PPO loss with its value loss, and one clipped step of AdamW, against autograd and
  `torch.optim.AdamW`: losses, every gradient, the gradients' norm, every weight after the step, and logprobs, entropies
  and values under the new weights.

A cell says *untied / tied*: the output embedding has weights of its own, or those of the input embedding.

## Proven

| architecture | class | generate | logprob | reward | train |
|---|---|---|---|---|---|
{rows}

With these, Generate's logprobs are Logprob's bit for bit on a CPU with one thread (`--exact`), except with mixtures of
experts ({inexact}): their products round by the number of
tokens that an expert gets. They are right all the same, and PPO scores its rollouts again.

Adapters go on linear layers. Where transformers keeps all experts of a layer in one tensor (Mixtral, Qwen3-MoE,
OLMoE), adapt the attention (`target_modules` q_proj, k_proj, v_proj, o_proj); PEFT's `target_parameters` are refused.

## Refused

A server for one of these does not start, and says why:

| architecture | class | why |
|---|---|---|
{reasons}

"It does not let its attention be replaced" means that transformers has not moved the model to its attention interface,
through which the engine gets flat batches and its cache. Logits that differ come from layers that carry a state from
one token to the next (Mamba, linear attention): rows of one batch would run into each other.

## An architecture that is not here

Try it: `onebase serve MODEL`. Loading runs random sequences through the untouched model and through the engine, packed,
cached and in chunks, and compares every layer's mask with the causal window that the engine applies, up to the end of
the context. What is served has passed that; this page adds adapters, rewards, training and lengths beyond windows.

To add one to the matrix, add a `Case` to [tests/matrix/cases.py](../tests/matrix/cases.py): the configuration's class,
settings that make it small, and in `shows` those whose loss must show in the numbers. Then run `make matrix`.
"""
