"""A worker without a model: numbers follow from tokens and adapter uid alone, so a test can say what it expects."""

from __future__ import annotations

import errno
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

import numpy as np

from onebase.server import jobs
from onebase.server.errors import (
    Aborted,
    Cancelled,
    DeadlineExceeded,
    ResourceExhausted,
    Unavailable,
    disk_full,
    not_there,
)

FACTS = jobs.BaseFacts(
    model="fake",
    architecture="FakeForCausalLM",
    fingerprint="f" * 64,
    vocab_size=1000,
    hidden_size=8,
    num_layers=2,
    max_context=64,
    dtype="float32",
    device="cpu",
    parameter_count=12345,
    weights_bytes=49380,
    eos_token_ids=(2, 3),
    pad_token_id=None,
    bos_token_id=1,
    chat_template=True,
)


class FakeText:
    """One token per word: its length, but for words that say their id (#7)."""

    def encode_prompt(self, text):
        return np.array([1, *self._words(text)], dtype=np.int64)

    def encode_completion(self, text):
        return np.array(self._words(text), dtype=np.int64)

    def encode_joined(self, prompt, completion):
        return self.encode_prompt(f"{prompt} {completion}")

    def encode_chat(self, messages, *, generation_prompt):
        """Role, words and 14 of each message; what says "tool" is rendered in another way from its beginning on."""
        roles = {"system": 11, "user": 12, "assistant": 13, "tool": 15}
        if strange := [message["role"] for message in messages if message["role"] not in roles]:
            raise ValueError(f"no role {strange[0]!r}")
        begin = 5 if messages[-1]["role"] == "tool" else 1
        said = [m for m in messages if m["content"] != "nothing"]
        ids = [i for m in said for i in (roles[m["role"]], *self._words(m["content"]), 14)]
        return np.array([begin, *ids, *([13] if generation_prompt else [])], dtype=np.int64)

    def encode_reply(self, prompt, completion):
        before = self.encode_chat(prompt, generation_prompt=True)
        whole = self.encode_chat([*prompt, *completion], generation_prompt=False)
        return whole[before.size :] if np.array_equal(whole[: before.size], before) else None

    def _words(self, text):
        return [int(word[1:]) if word.startswith("#") else 100 + len(word) for word in text.split()]


def logprobs(uid, tokens, start):
    return (-(tokens[start:] % 7 + 1) - uid / 100).astype(np.float32)


def values(uid, tokens, start):
    return (tokens[start:] / 1000 + uid).astype(np.float32)


def entropy(uid, tokens, start):
    return (tokens[start:] * 0 + uid / 10).astype(np.float32)


def token_scores(uid, tokens, label=0):
    return (np.cumsum(tokens) / 1000 + uid * 10 + label * 0.5).astype(np.float32)


def logits(uid, tokens, start, vocabulary):
    return (tokens[start:, None] / 10 + np.arange(vocabulary) + uid).astype(np.float32)


class FakeWorker:
    """Runs jobs on a thread, one at a time, those in `held` kinds of job left waiting until `release`."""

    def __init__(self, facts=FACTS, room=1000):
        self.facts = facts
        self.room = room
        self.adapters: dict[int, jobs.AdapterFacts] = {}
        self.submitted: list[jobs.Job] = []
        self.executed: list[jobs.Job] = []
        self.failures: list[Exception] = []  # the next jobs fail so
        self.before: Callable[[jobs.Job], None] = lambda job: None
        self.read: dict[str, bytes] = {}  # the files of the directory that was loaded last
        self.written = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}  # what a save writes
        self.value_heads = True  # of loaded policies that ask for none
        self._snapshots = itertools.count()
        self.client_states = {}
        self.full = False  # the disk
        self.refusals = []
        self.stuck = 0.0  # seconds
        self.ticket = ""  # of a crash
        self.evicted = {}  # uid → where it is read again
        self.came_back = []  # the directories that evicted adapters were read from
        self.busy = set()  # uids that something needs
        self.endless = False  # completions that go on until they are cancelled
        self._held: tuple[type, ...] = ()
        self._pending: list[jobs.Job] = []
        self._wake = threading.Condition()
        self._draining = self._cut = self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    # ---- the worker's shape

    def start(self):
        self._thread.start()

    def submit(self, job):
        with self._wake:
            if self._draining and not isinstance(job, jobs.SaveAdapterJob):
                raise Unavailable("DRAINING", "the server drains")
            if job.work is not jobs.Work.ADMIN and len(self._pending) >= self.room:
                raise ResourceExhausted("QUEUE_FULL", "the queue is full", retry_after=0.25)
            self.submitted.append(job)
            self._pending.append(job)
            self._wake.notify_all()

    def refused(self, tenant, session):
        self.refusals.append((tenant, session))

    def check(self, _session):
        with self._wake:
            if len(self._pending) >= self.room:
                raise ResourceExhausted("QUEUE_FULL", "the queue is full", retry_after=0.25)

    def status(self):
        counts = {jobs.Work.SCORE: sum(job.work is jobs.Work.SCORE for job in self._pending)}
        return jobs.WorkerStatus(counts, {jobs.Work.TRAIN: 4}, 1.5, 2.5, 3.5, len(self.executed), 4096, 5, 32)

    def stuck_seconds(self):
        return self.stuck

    def lost(self):
        return self.ticket

    def abandon(self, why):
        self.ticket = self.ticket or f"abandoned: {why}"
        return self.ticket

    def drain(self, seconds):
        until = time.monotonic() + seconds
        with self._wake:
            self._draining = True
            self._wake.notify_all()
            self._wake.wait_for(lambda: not self._pending, timeout=max(0.0, until - time.monotonic()))

    def cut_off(self):
        with self._wake:
            self._draining = self._cut = True
            self._wake.notify_all()
            only_saves = lambda: all(isinstance(job, jobs.SaveAdapterJob) for job in self._pending)  # noqa: E731
            self._wake.wait_for(lambda: only_saves() or self.ticket or not self._thread.is_alive())

    def stop(self, drain_seconds):
        until = time.monotonic() + drain_seconds
        with self._wake:
            self._draining = True
            self._wake.notify_all()
            self._wake.wait_for(lambda: not self._pending, timeout=max(0.0, until - time.monotonic()))
            self._stopped = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        for job in self._pending:
            job.done.set_exception(Unavailable("DRAINED", "the server has stopped"))

    # ---- for tests

    def hold(self, *kinds):
        self._held = kinds

    def release(self):
        with self._wake:
            self._held = ()
            self._wake.notify_all()

    def wait_submitted(self, kind, count=1):
        with self._wake:
            assert self._wake.wait_for(lambda: sum(isinstance(j, kind) for j in self.submitted) >= count, timeout=20)
        return [job for job in self.submitted if isinstance(job, kind)]

    def wait_done(self, job):
        with self._wake:
            assert self._wake.wait_for(job.done.done, timeout=20)

    # ---- its thread

    def _run(self):
        while (job := self._next()) is not None:
            try:
                self._check(job)
                self.before(job)
                if self.failures:
                    raise self.failures.pop(0)
                result = self._execute(job)
            except Exception as error:
                job.done.set_exception(error)
            else:
                job.done.set_result(result)
            with self._wake:
                self._pending.remove(job)
                self._wake.notify_all()

    def _next(self):
        with self._wake:
            while not self._stopped:
                for job in self._pending:
                    late = job.deadline is not None and time.monotonic() > job.deadline
                    if job.cancelled or late or self._is_cut(job) or not isinstance(job, self._held):
                        return job
                self._wake.wait(0.005)
            return None

    def _is_cut(self, job):
        return self._cut and not isinstance(job, jobs.SaveAdapterJob)

    def _check(self, job):
        if self._is_cut(job):
            raise Unavailable("DRAINED", "the server has stopped")
        if job.cancelled:
            raise Cancelled("CANCELLED", "the client cancelled")
        if job.deadline is not None and time.monotonic() > job.deadline:
            raise DeadlineExceeded("DEADLINE_EXCEEDED", "too late")

    def _execute(self, job):
        self.executed.append(job)
        for uid in () if isinstance(job, jobs.DeleteAdapterJob | jobs.DropGradientsJob) else jobs.adapters_of(job):
            if uid in self.evicted:
                with self.evicted.pop(uid)() as path:
                    self.came_back.append(path)
                self._change(uid, resident=True, idle_seconds=0.0, memory=jobs.AdapterMemory(weights=1000 + uid))
        return getattr(self, f"_{type(job).__name__}")(job)

    def _adapter(self, uid, expected=None):
        version = 0
        if uid != jobs.BASE:
            if uid not in self.adapters:
                raise not_there()
            version = self.adapters[uid].version
        if expected is not None and expected != version:
            raise Aborted("VERSION_MISMATCH", f"{expected} is not {version}")
        return version

    def _ScoreJob(self, job):
        versions = {row.adapter: self._adapter(row.adapter, job.versions.get(row.adapter)) for row in job.rows}
        return jobs.ScoreResult(tuple(self._row(row) for row in job.rows), versions)

    def _row(self, row):
        uid, tokens, start = row.adapter, row.tokens, row.start
        return jobs.RowResult(
            logprobs=logprobs(uid, tokens, start) if row.logprobs else None,
            entropy=entropy(uid, tokens, start) if row.entropy else None,
            values=values(uid, tokens, start) if row.values else None,
            scores=self._labels(uid, tokens)[row.score_at] if row.score else None,
            token_scores=self._labels(uid, tokens) if row.token_scores else None,
            logits=logits(uid, tokens, start, self.facts.vocab_size) if row.logits else None,
        )

    def _labels(self, uid, tokens):
        return np.stack([token_scores(uid, tokens, label) for label in range(self.adapters[uid].num_labels)], axis=1)

    def _GenerateJob(self, job):
        version = self._adapter(job.adapter, job.version)
        for prompt_index, prompt in enumerate(job.prompts):
            for index in range(job.n):
                count = 10**6 if self.endless else job.sampling.max_new_tokens
                for i in range(count):
                    self._check(job)
                    token = int((prompt.sum() + job.sampling.seed + index + i) % self.facts.vocab_size)
                    last = i == count - 1
                    job.emit(
                        jobs.CompletionChunk(
                            prompt_index=prompt_index,
                            completion_index=index,
                            tokens=(token,),
                            logprobs=(-0.5,),
                            values=(0.25,),
                            text=f"<{token}>",
                            version=version,
                            finish_reason=jobs.FinishReason.LENGTH if last else None,
                        )
                    )

    def _change(self, uid, **changes):
        self.adapters[uid] = replace(self.adapters[uid], **changes)
        return self.adapters[uid]

    def _ForwardBackwardJob(self, job):
        version = self._adapter(job.adapter, job.expected_version)
        facts = self._change(job.adapter, pending_gradients=self.adapters[job.adapter].pending_gradients + 1)
        return jobs.ForwardBackwardResult(
            version=version,
            metrics={"loss/total": 0.5},
            logprobs=tuple(logprobs(job.adapter, row.tokens, row.start) for row in job.rows),
            entropy=tuple(-logprobs(job.adapter, row.tokens, row.start) for row in job.rows),
            values=tuple(values(job.adapter, row.tokens, row.start) for row in job.rows),
            ratio_threshold_exceeded=False,
            facts=facts,
        )

    def _OptimStepJob(self, job):
        version = self._adapter(job.adapter, job.expected_version) + 1
        applied = self.adapters[job.adapter].pending_gradients
        facts = self._change(job.adapter, pending_gradients=0, version=version)
        self._leave(job.adapter, job.client_state)
        saved = None
        if job.save_to is not None:
            saved = Future()
            try:
                saved.set_result(self._save(job.adapter, job.save_to))
            except Exception as error:
                saved.set_exception(error)
        return jobs.OptimStepResult(version, 1.25, applied, facts, saved)

    def _make(self, uid, kind, version, value_head, lora):
        labels = 1 if kind is jobs.AdapterKind.REWARD else 0
        memory = jobs.AdapterMemory(weights=1000 + uid)
        self.adapters[uid] = jobs.AdapterFacts(uid, kind, version, lora, value_head, labels, 250, memory, 0)
        return self.adapters[uid]

    def _DropGradientsJob(self, job):
        return self._change(job.adapter, pending_gradients=0)

    def _CreateAdapterJob(self, job):
        if job.init_from is not None:
            self._adapter(job.init_from)
        lora = job.lora if job.init_from is None else self.adapters[job.init_from].lora
        return self._make(job.uid, job.kind, job.least_version, job.value_head, lora)

    def _LoadAdapterJob(self, job):
        if job.path is not None and job.path.is_dir():
            self.read = {file.name: file.read_bytes() for file in job.path.iterdir()}
        head = job.kind.trained and (job.value_head or self.value_heads)
        self._make(job.uid, job.kind, job.least_version, head, jobs.LoraSpec())
        return self._change(job.uid, append_eos=job.append_eos, pooling=job.pooling or jobs.Pooling.LAST_TOKEN)

    def _leave(self, uid, data):
        if data is not None:
            self.client_states[uid] = jobs.ClientState(data, self.adapters[uid].version)

    def _ClientStateJob(self, job):
        self._adapter(job.adapter)
        return self.client_states.get(job.adapter, jobs.ClientState())

    def _SaveAdapterJob(self, job):
        self._leave(job.adapter, job.client_state)
        return self._save(job.adapter, job.path)

    def _save(self, uid, path):
        if self.full:
            raise disk_full(OSError(errno.ENOSPC, "full"))
        version = self._adapter(uid)
        path.mkdir(parents=True)
        for name, data in self.written.items():
            (path / name).write_bytes(data)
        return jobs.SaveResult(path, version, 77, next(self._snapshots))

    def _DeleteAdapterJob(self, job):
        self._adapter(job.adapter)
        del self.adapters[job.adapter]

    def _EvictAdapterJob(self, job):
        facts = self.adapters[job.adapter]
        if (
            facts.resident
            and facts.version == job.version
            and not facts.pending_gradients
            and job.adapter not in self.busy
        ):
            self.evicted[job.adapter] = job.open
            return self._change(job.adapter, resident=False, memory=jobs.AdapterMemory())
        return facts

    def _DescribeAdaptersJob(self, job):
        return dict(self.adapters)
