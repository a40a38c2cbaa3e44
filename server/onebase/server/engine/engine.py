"""The engine: one base, any adapters, one step at a time.

A step is one flat batch of rows through the base: prompts, tokens to decode and sequences to score, of any adapters,
side by side. A training pass goes through the same layers with gradients, rows of several policies in one batch.
Nothing here knows of requests, sessions or queues; and only one thread may call it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from onebase.server import failpoints
from onebase.server.engine.absent import Absent
from onebase.server.engine.adapters import Adapter, Moments, Weights
from onebase.server.engine.batch import Batch, Route, Row, flatten, row_multiple
from onebase.server.engine.formats import Formats
from onebase.server.engine.heads import LmHead, all_logits, linear_head, token_logprobs
from onebase.server.engine.kv import KVCache
from onebase.server.engine.merging import Merger
from onebase.server.engine.sampling import draw
from onebase.server.engine.segmented import SegmentedLora
from onebase.server.engine.stacks import Stacks
from onebase.server.engine.text import Detokenizer, Text
from onebase.server.engine.training import Pass, begin
from onebase.server.errors import FailedPrecondition, not_there
from onebase.server.jobs import (
    BASE,
    AdapterFacts,
    BaseFacts,
    ClientState,
    Floats,
    ForwardBackwardJob,
    RowResult,
    Sampling,
    ScoreRow,
    Tokens,
)


@dataclass(frozen=True)
class Scoring:
    """A row to score, with the version that it reads."""

    row: ScoreRow
    weights: Weights | None


@dataclass(frozen=True)
class Draw:
    """One token to draw: for which completion, and which tokens may not come yet."""

    sampling: Sampling
    place: tuple[int, int, int]  # prompt index, completion index, position in the completion
    banned: tuple[int, ...] = ()


@dataclass(frozen=True)
class Decoding:
    """Tokens to run, and the draws from what comes after the last of them (several when completions share a prompt)."""

    row: Row
    draws: tuple[Draw, ...]
    value: bool = False


@dataclass(frozen=True)
class Drawn:
    """A token, its logprob at temperature 1 with nothing banned, and the value before it (nan if not asked for).

    Logits that are not finite, and bans that leave no token, give a logprob that is not; then the token means nothing.
    """

    token: int
    logprob: float
    value: float


class Engine:
    """The base with its adapters on the device.

    Args:
        model: the causal LM with MultiLoraLinear layers and our attention.
        route: what those layers share.
        head: its output embedding.
        formats: reads and writes adapters for this base.
        merger: writes the base with an adapter merged into it.
        text: its tokenizer.
        facts: what it is.
        kv: a place per running completion.
        widths: of the layers' outputs.
        segmented: makes the adapters' products of steps without gradients, if kernels are to; torch's otherwise.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        route: Route,
        head: LmHead,
        formats: Formats,
        merger: Merger,
        text: Text,
        facts: BaseFacts,
        kv: KVCache,
        widths: Iterable[int],
        segmented: SegmentedLora | None = None,
    ) -> None:
        self.text = text
        self.facts = facts
        self.kv = kv
        self.head = head
        self.adapters: dict[int, Adapter] = {}
        self.absent: dict[int, Absent] = {}
        self.version_window = 0
        self.recomputed: list[nn.Module] = []
        self._model = model
        self._route = route
        self._formats = formats
        self._merger = merger
        self._device = torch.device(facts.device)
        self._multiple = row_multiple(widths)
        self._stacks = Stacks()
        self._segmented = segmented

    # ------------------------------------------------------------------------------------------------ adapters

    def add(self, adapter: Adapter) -> AdapterFacts:
        """Takes an adapter in."""
        adapter.window = self.version_window
        self.adapters[adapter.uid] = adapter
        return adapter.facts()

    def adapter(self, uid: int) -> Adapter:
        """The adapter; Gone if it is not there any more."""
        adapter = self.adapters.get(uid)
        if adapter is None:
            raise not_there()
        return adapter

    def delete(self, uid: int) -> None:
        """Forgets an adapter; versions with readers live on until the last of them is done."""
        if self.absent.pop(uid, None) is None:
            self.adapter(uid)
            del self.adapters[uid]

    def evict(self, uid: int, open_: Callable[[], AbstractContextManager[Path]]) -> AdapterFacts:
        """Frees the memory of an adapter that nobody reads or trains; `open_` gives the directory that has it."""
        absent = self.absent[uid] = Absent.of(self.adapter(uid), open_)
        del self.adapters[uid]
        self.rest()  # stacks are copies
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return absent.facts

    def take_back(self, adapter: Adapter) -> None:
        """Takes an evicted adapter in again, unless it was deleted meanwhile."""
        if self.absent.pop(adapter.uid, None) is not None:
            adapter.used = time.monotonic()
            self.adapters[adapter.uid] = adapter

    def all_facts(self) -> dict[int, AdapterFacts]:
        """Facts of all adapters, by uid."""
        there = {uid: adapter.facts() for uid, adapter in self.adapters.items()}
        return there | {uid: absent.facts for uid, absent in self.absent.items()}

    @property
    def formats(self) -> Formats:
        """Reads and writes adapters. Any thread may use it."""
        return self._formats

    @property
    def merger(self) -> Merger:
        """Writes merged models. Any thread may use it."""
        return self._merger

    def snapshot(self, uid: int, *, with_optimizer: bool, with_client_state: bool = False) -> Adapter:
        """An adapter as it is now, for another thread to read: steps do not change it, and it takes no copy but of
        the moments, if they are wanted. Give its weights back with `release`.

        Raises:
            NotFound: it is gone.
        """
        adapter = self.adapter(uid)
        failpoints.hit("snapshot")
        moments = adapter.moments or Moments.zeros(adapter.weights.parameters()) if with_optimizer else None
        kept = adapter.client_state if with_client_state else ClientState()
        taken = dataclasses.replace(
            adapter, moments=moments and moments.copy(), gradients={}, old=[], client_state=kept
        )
        adapter.weights.readers += 1
        return taken

    def bind(self, uid: int, version: int | None = None) -> Weights | None:
        """Begins to read an adapter: a version of it, the newest if none is named, which now cannot change.

        Give it back with `release`.

        Raises:
            NotFound: it is gone.
            Aborted: it does not have that version any more, or not yet.
        """
        if uid == BASE:
            return None
        weights = self.adapter(uid).at(version)
        weights.readers += 1
        return weights

    def release(self, weights: Weights | None) -> None:
        """Ends what `bind` began."""
        if weights is not None:
            weights.readers -= 1

    def detokenizer(self, prompt: Tokens) -> Detokenizer:
        """For the text of a new completion of a prompt."""
        return Detokenizer(self.text, prompt)

    def rest(self) -> None:
        """Frees what is only worth keeping while there is work."""
        self._stacks.drop()
        if self._segmented is not None:
            self._segmented.drop()

    def relieve(self) -> None:
        """Frees what only saves time, after memory ran out: nothing of the step that failed may be held any more."""
        self.rest()
        self.kv.forget()
        gc.collect(1)  # what was made of late; all of it would take longer than a step
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def begin_pass(self, job: ForwardBackwardJob) -> Pass:
        """A training pass before its first row; see `training`."""
        return begin(self.adapter(job.adapter), job)

    # --------------------------------------------------------------------------------------------------- steps

    def forward(self, rows: Sequence[Row]) -> tuple[Batch, torch.Tensor]:
        """Runs rows through the base: the batch, and the last hidden states [N, hidden] after the final norm."""
        with self.showing(rows) as batch:
            return batch, self.run(batch)

    @contextlib.contextmanager
    def showing(self, rows: Sequence[Row]) -> Iterator[Batch]:
        """Shows the base's layers a batch; as long as layers may be run again for it (recomputed in a backward)."""
        batch = flatten(rows, self._device, self._multiple)
        for row in rows:
            if row.slot is not None:
                self.kv.reach(row.slot, row.past + len(row.tokens))
        if self._segmented is None or torch.is_grad_enabled():
            self._route.begin(batch, self.kv, self._stacks.group(batch.segments))
        else:
            self._route.begin(batch, self.kv, segmented=self._segmented.step(batch.segments))
        try:
            yield batch
        finally:
            self._route.end()

    def run(self, batch: Batch) -> torch.Tensor:
        """The last hidden states [N, hidden] of the batch that is shown, after the final norm."""
        for layer in self.recomputed:
            layer.training = torch.is_grad_enabled()
        out = self._model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=None, use_cache=False
        )
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden

    @torch.no_grad()
    def step(
        self, scorings: Sequence[Scoring], decodings: Sequence[Decoding]
    ) -> tuple[list[RowResult], list[list[Drawn]]]:
        """One step without gradients: numbers for each scoring, and a list of drawn tokens for each decoding."""
        rows = [Row(s.weights, _needed(s.row)) for s in scorings]
        _, hidden = self.forward([*rows, *(d.row for d in decodings)])
        failpoints.hit("infer")
        scored = self._score(scorings, rows, hidden)
        return scored, self._draw(decodings, hidden) if decodings else []

    def _score(self, scorings: Sequence[Scoring], rows: Sequence[Row], hidden: torch.Tensor) -> list[RowResult]:
        spans = [_completion_span(s.row, row) for s, row in zip(scorings, rows, strict=True)]
        wanted = [i for i, s in enumerate(scorings) if s.row.logprobs or s.row.entropy]
        logprobs: dict[int, Floats] = {}
        entropies: dict[int, Floats] = {}
        if wanted:
            targets = torch.from_numpy(
                np.concatenate([scorings[i].row.tokens[scorings[i].row.start :] for i in wanted])
            )
            index = torch.cat([torch.arange(*spans[i]) for i in wanted])
            lengths = [spans[i][1] - spans[i][0] for i in wanted]
            entropy = any(scorings[i].row.entropy for i in wanted)
            lp, ent = token_logprobs(
                self.head, hidden[index.to(self._device)], targets.to(self._device), entropy=entropy
            )
            logprobs = dict(zip(wanted, _split(lp, lengths), strict=True))
            entropies = {} if ent is None else dict(zip(wanted, _split(ent, lengths), strict=True))
        results = []
        for i, (scoring, row) in enumerate(zip(scorings, rows, strict=True)):
            want = scoring.row
            before = hidden[slice(*spans[i])]
            scores, token_scores = _scores(scoring, hidden[row.start : row.stop])
            results.append(
                RowResult(
                    logprobs=logprobs[i] if want.logprobs else None,
                    entropy=entropies[i] if want.entropy else None,
                    values=_values(scoring.weights, before) if want.values else None,
                    scores=scores,
                    token_scores=token_scores,
                    logits=all_logits(self.head, before).numpy() if want.logits else None,
                )
            )
        return results

    def _draw(self, decodings: Sequence[Decoding], hidden: torch.Tensor) -> list[list[Drawn]]:
        drawing = [d for d in decodings if d.draws]
        if not drawing:
            return [[] for _ in decodings]
        last = torch.tensor([d.row.stop - 1 for d in drawing], device=self._device)
        states = hidden[last]
        logits = self.head.logits(states)  # [D, vocabulary]
        totals = torch.logsumexp(logits, dim=-1)
        owners = [i for i, d in enumerate(drawing) for _ in d.draws]
        draws = [one for d in drawing for one in d.draws]
        allowed = logits[owners]
        for i, one in enumerate(draws):
            if one.banned:
                allowed[i, list(one.banned)] = -torch.inf
        tokens = draw(allowed, [one.sampling for one in draws], [one.place for one in draws])
        chosen = torch.tensor(tokens, device=self._device)
        logprobs = (
            allowed[torch.arange(len(draws), device=self._device), chosen] - totals[owners]
        ).tolist()  # -inf where all are banned
        values = _values_by_adapter(drawing, states)
        drawn: list[list[Drawn]] = [[] for _ in drawing]
        for owner, token, logprob in zip(owners, tokens, logprobs, strict=True):
            drawn[owner].append(Drawn(token, logprob, values[owner]))
        rest = iter(drawn)
        return [next(rest) if d.draws else [] for d in decodings]


def _needed(row: ScoreRow) -> list[int]:
    """The tokens that must be run: the last one only matters to a score, and what is behind a score not to it."""
    tokens: list[int] = row.tokens.tolist()
    if row.score and not (row.token_scores or row.logprobs or row.entropy or row.values or row.logits):
        return tokens[: _score_place(row) + 1]
    return tokens if row.score or row.token_scores else tokens[:-1]


def _score_place(row: ScoreRow) -> int:
    """Index of the token at which the score is read."""
    return row.score_at % len(row.tokens)


def _completion_span(want: ScoreRow, row: Row) -> tuple[int, int]:
    """Flat places before each completion token."""
    return row.start + want.start - 1, row.start + len(want.tokens) - 1


def _split(flat: torch.Tensor, lengths: Iterable[int]) -> list[Floats]:
    array: Floats = flat.float().cpu().numpy()
    return [part.copy() for part in np.split(array, np.cumsum(list(lengths))[:-1])]


def _values(weights: Weights | None, hidden: torch.Tensor) -> Floats:
    if weights is None or weights.value_head is None:
        raise FailedPrecondition("NO_VALUE_HEAD", "this adapter has no value head: create or load it with value_head")
    values: Floats = linear_head(weights.value_head, hidden)[:, 0].float().cpu().numpy()
    return values


def _values_by_adapter(drawing: Sequence[Decoding], states: torch.Tensor) -> list[float]:
    """The value of each decoding's state [D, hidden]; nan where it was not asked for."""
    values = [math.nan] * len(drawing)
    asking: dict[Weights | None, list[int]] = {}
    for i, one in enumerate(drawing):
        if one.value:
            asking.setdefault(one.row.weights, []).append(i)
    for weights, places in asking.items():
        for i, value in zip(places, _values(weights, states[places]).tolist(), strict=True):
            values[i] = value
    return values


def _scores(scoring: Scoring, hidden: torch.Tensor) -> tuple[Floats | None, Floats | None]:
    """The scores [L] and the token scores [T, L] of a row's states [T, hidden], if they are asked for."""
    row = scoring.row
    if not (row.score or row.token_scores):
        return None, None
    if scoring.weights is None or scoring.weights.score_head is None:
        raise FailedPrecondition("NO_SCORE_HEAD", "this adapter has no score head: name a reward adapter")
    place = _score_place(row)
    states = hidden if row.token_scores else hidden[place : place + 1]
    found: Floats = linear_head(scoring.weights.score_head, states).float().cpu().numpy()
    scores = found[place if row.token_scores else 0] if row.score else None
    return scores, found if row.token_scores else None
