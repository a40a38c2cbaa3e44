"""A server in memory with a policy small enough to differentiate by hand, so that the loop can be seen to learn.

The policy is a table of logits, one row per previous token, added to the reference's; the value is a number per
previous token. Gradients, Adam and the clipped losses are real. Letters are tokens: "a" is 1, "b" is 2, and so on; 0
ends a completion.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field, replace

import numpy as np

from onebase.client import types as t
from onebase.client.errors import AbortedError, AlreadyExistsError, FailedPreconditionError, NotFoundError

VOCABULARY = 6
EOS = 0
GOOD = 3
"""The token that the reward adapter "good" counts."""


def encode(text):
    """Token ids of a text of the letters a to e."""
    return [ord(letter) - ord("a") + 1 for letter in text]


def decode(tokens):
    """The text of token ids, the end left out."""
    return "".join(chr(ord("a") + int(token) - 1) for token in tokens if token != EOS)


@dataclass
class ToyAdapter:
    """A policy's parameters, gradients and Adam moments; parameters are one array, values in the last column."""

    name: str
    create_time: float
    kind: str = "policy"
    value_head: bool = True
    version: int = 0
    weights: np.ndarray = field(default_factory=lambda: np.zeros((VOCABULARY, VOCABULARY + 1)))
    gradients: np.ndarray = field(default_factory=lambda: np.zeros((VOCABULARY, VOCABULARY + 1)))
    first: np.ndarray = field(default_factory=lambda: np.zeros((VOCABULARY, VOCABULARY + 1)))
    second: np.ndarray = field(default_factory=lambda: np.zeros((VOCABULARY, VOCABULARY + 1)))
    updates: int = 0
    pending: int = 0

    def facts(self):
        return t.Adapter(
            name=self.name,
            kind=self.kind,
            version=self.version,
            lora=t.LoraSpec(),
            value_head=self.value_head,
            num_labels=0,
            parameter_count=self.weights.size,
            weights_bytes=0,
            gradient_bytes=0,
            optimizer_bytes=0,
            old_version_bytes=0,
            leased=False,
            pending_gradients=self.pending,
            create_time=self.create_time,
            source="",
        )


def base_model(*, exact):
    """What the toy says of its base."""
    numbers = dict.fromkeys(("hidden_size", "num_layers", "max_context", "parameter_count", "weights_bytes"), 1)
    texts = dict.fromkeys(("model", "architecture", "fingerprint", "dtype", "device", "quantization"), "toy")
    ids = {"eos_token_ids": (EOS,), "pad_token_id": None, "bos_token_id": None}
    return t.BaseModel(vocab_size=VOCABULARY, exact=exact, chat_template=False, **numbers, **texts, **ids)


class ToyServer:
    """What survives its clients: adapters, checkpoints, sessions, and a log of the calls that were made."""

    def __init__(self, *, can_save=True, exact=False):
        self.exact = exact
        self.reference = np.random.default_rng(7).normal(0, 0.5, (VOCABULARY, VOCABULARY))
        self.adapters = {}
        self.checkpoints = {}
        self.sessions = {}  # id -> active adapter
        self.can_save = can_save
        self.declared = {"good": None, "long": None}  # reward adapters, and whether they say that they read an EOS
        self.calls = []
        self.clock = itertools.count(1)
        self.ids = itertools.count(1)

    def client(self):
        return ToyClient(self)

    def forget_sessions(self):
        self.sessions.clear()

    def restart(self):
        """Like a new process: only the checkpoints are left."""
        self.adapters.clear()
        self.sessions.clear()


class ToyClient:
    def __init__(self, server):
        self.server = server

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def info(self):
        return t.ServerInfo(version="0", base=base_model(exact=self.server.exact), limits=None, reward_adapters=())

    def adapter(self, name):
        if name in self.server.declared:
            facts = ToyAdapter(name, create_time=0.0, kind="reward", value_head=False).facts()
            return replace(facts, append_eos=self.server.declared[name])
        if name not in self.server.adapters:
            raise NotFoundError(f"no adapter {name!r}")
        return self.server.adapters[name].facts()

    def open_session(self, ppo_adapter_name="", *, label="", ttl=60.0, resume="", wait=0.0):
        if ppo_adapter_name:
            self.adapter(ppo_adapter_name)
        session_id = resume if resume in self.server.sessions else f"session-{next(self.server.ids)}"
        self.server.sessions[session_id] = ppo_adapter_name or self.server.sessions.get(session_id, "")
        self.server.calls.append(("open_session", {"label": label, "resumed": session_id == resume}))
        return ToySession(self.server, session_id)


class ToySession:
    def __init__(self, server, session_id):
        self.server = server
        self.id = session_id
        self.adapter = server.client().adapter

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.server.sessions.pop(self.id, None)

    @property
    def ppo_adapter_name(self):
        return self.server.sessions[self.id]

    def set_active(self, name):
        assert name in self.server.adapters
        self.server.sessions[self.id] = name

    # ------------------------------------------------------------------------------------------- adapters

    def create_adapter(self, name, lora=None, *, kind="policy", value_head=True, init_from="", seed=0):
        if name in self.server.adapters:
            raise AlreadyExistsError(name)
        adapter = ToyAdapter(name, create_time=float(next(self.server.clock)), kind=kind, value_head=value_head)
        self.server.adapters[name] = adapter
        self.server.calls.append(("create_adapter", {"name": name, "lora": lora, "seed": seed}))
        self.server.begun_from = init_from
        return adapter.facts()

    def save_adapter(self, path, *, name="", with_optimizer=False, overwrite=False):
        if not self.server.can_save:
            raise FailedPreconditionError("the server has no save root", reason="SAVE_ROOT_MISSING")
        if path in self.server.checkpoints and not overwrite:
            raise AlreadyExistsError(path)
        adapter = self._adapter(name)
        self.server.checkpoints[f"/root/{path}"] = (copy.deepcopy(adapter), with_optimizer)
        return t.SavedAdapter(path=f"/root/{path}", adapter=self._version(adapter), bytes=1)

    def load_adapter(self, name, path, *, kind="policy", value_head=False, replace=False, with_optimizer=False, seed=0):
        if name in self.server.adapters and not replace:
            raise AlreadyExistsError(name)
        saved, has_optimizer = self.server.checkpoints[path]
        assert has_optimizer or not with_optimizer
        adapter = copy.deepcopy(saved)
        adapter.create_time = float(next(self.server.clock))
        if name in self.server.adapters:
            adapter.version = self.server.adapters[name].version + 1
        self.server.adapters[name] = adapter
        self.server.calls.append(("load_adapter", {"path": path, "replace": replace}))
        return adapter.facts()

    # -------------------------------------------------------------------------------------------- reading

    def generate(self, prompts, *, sampling, adapter="", logprobs=False, values=False):
        logits = self._logits(self._adapter(adapter))
        assert self._adapter(adapter).value_head or not values
        completions = []
        for index, prompt in ((index, prompt) for index, prompt in enumerate(prompts) for _ in range(sampling.n)):
            number = len(completions) - index * sampling.n
            rng = np.random.default_rng((sampling.seed, index, number))
            ids = self._ids(prompt)
            tokens, before, reason = [], [], "length"
            while len(tokens) < sampling.max_new_tokens:
                row = logits[tokens[-1] if tokens else ids[-1]] / sampling.temperature
                row = (
                    np.where(np.arange(VOCABULARY) == EOS, -np.inf, row)
                    if len(tokens) < sampling.min_new_tokens
                    else row
                )
                before.append(tokens[-1] if tokens else ids[-1])
                tokens.append(int(np.argmax(row + rng.gumbel(size=VOCABULARY))))
                if tokens[-1] == EOS:
                    reason = "eos"
                    break
            completions.append(
                t.Completion(
                    prompt_index=index,
                    completion_index=number,
                    text=decode(tokens),
                    tokens=np.array(tokens, dtype=np.int32),
                    logprobs=log_softmax(logits)[before, tokens].astype(np.float32) if logprobs else None,
                    values=self._adapter(adapter).weights[before, VOCABULARY].astype(np.float32) if values else None,
                    finish_reason=reason,
                    adapter=self._version(self._adapter(adapter)),
                    seed=sampling.seed,
                    prompt_tokens=len(ids),
                )
            )
        return completions

    def score(
        self,
        sequences,
        *,
        rewards=None,
        reference="base",
        outputs=None,
        append_eos=None,
        pooling=None,
        ppo_adapter_name="",
        critic="",
    ):
        rewards = None if rewards is None else {term.key: term.weight for term in rewards}
        self.server.calls.append(("score", {"rewards": rewards, "outputs": tuple(outputs), "append_eos": append_eos}))
        self.server.pooling = pooling
        adapter = self._adapter(ppo_adapter_name)
        teller = self._adapter(critic)
        assert "values" not in outputs or teller.value_head
        policy, base = log_softmax(self._logits(adapter)), log_softmax(self.server.reference)
        scores = []
        for sequence in sequences:
            before, tokens = self._steps(sequence)
            raw = {name: self._reward(name, tokens) for name in rewards or {}} if "rewards" in outputs else {}
            scores.append(
                t.Score(
                    logprobs=policy[before, tokens].astype(np.float32) if "logprobs" in outputs else None,
                    reference_logprobs=base[before, tokens].astype(np.float32)
                    if "reference_logprobs" in outputs
                    else None,
                    values=teller.weights[before, VOCABULARY].astype(np.float32) if "values" in outputs else None,
                    entropy=None,
                    scores=raw,
                    reward=sum((rewards or {})[name] * score for name, score in raw.items()),
                    completion_tokens=None,
                    eos_appended=dict.fromkeys(raw, bool(append_eos and tokens[-1] != EOS)),
                    policy=self._version(adapter),
                    reference=t.AdapterVersion("base", 0),
                )
            )
        return scores

    def logprob(self, sequences, *, adapter="", adapter_version=None):
        target = self._adapter(adapter)
        self._check_version(target, adapter_version)
        self.server.calls.append(("logprob", {"sequences": sequences}))
        table = log_softmax(self._logits(target))
        answers = []
        for sequence in sequences:
            ids = self._ids(sequence.completion)
            before, tokens = self._steps(t.Sequence(sequence.prompt, ids))
            logprobs = table[before, tokens].astype(np.float32)
            told = np.array(ids) if isinstance(sequence.completion, str) else None
            answers.append(t.Logprobs(logprobs, None, None, told, self._version(target)))
        return answers

    # ------------------------------------------------------------------------------------------- training

    def forward_backward(
        self, sequences, loss, *, adapter="", denominator=None, expected_version=None, expected_pending=None
    ):
        target = self._adapter(adapter)
        self._check_version(target, expected_version)
        self._check_pending(target, expected_pending)
        batch = ToyBatch(self, target, sequences)
        kinds = {
            t.PpoLoss: batch.ppo,
            t.CustomLoss: batch.custom,
            t.CrossEntropyLoss: batch.cross_entropy,
            t.ValueLoss: batch.value_alone,
            t.DpoLoss: batch.dpo,
        }
        count = denominator or (1 if isinstance(loss, t.CustomLoss) else batch.mask.sum())
        metrics = kinds[type(loss)](loss, count)
        target.pending += 1
        self.server.calls.append(
            ("forward_backward", {"sequences": sequences, "denominator": denominator, "loss": loss})
        )
        return t.ForwardBackward(
            adapter=self._version(target),
            metrics=metrics if target.kind == "critic" else {"policy/entropy": batch.entropy, **metrics},
            logprobs=(),
            entropy=(),
            values=(),
            ratio_threshold_exceeded=False,
            pending_gradients=target.pending,
        )

    def optim_step(self, adamw, *, max_grad_norm=0.0, adapter="", expected_version=None, expected_pending=None):
        target = self._adapter(adapter)
        self._check_version(target, expected_version)
        self._check_pending(target, expected_pending)
        if not target.pending:
            raise FailedPreconditionError("no pending gradients")
        norm = float(np.linalg.norm(target.gradients))
        gradients = target.gradients * min(1.0, max_grad_norm / norm) if max_grad_norm and norm else target.gradients
        target.updates += 1
        target.first = adamw.beta1 * target.first + (1 - adamw.beta1) * gradients
        target.second = adamw.beta2 * target.second + (1 - adamw.beta2) * gradients**2
        first = target.first / (1 - adamw.beta1**target.updates)
        second = target.second / (1 - adamw.beta2**target.updates)
        target.weights = target.weights - adamw.learning_rate * first / (np.sqrt(second) + adamw.eps)
        applied, target.pending, target.gradients = target.pending, 0, np.zeros_like(target.gradients)
        target.version += 1
        self.server.calls.append(("optim_step", {"adamw": adamw, "max_grad_norm": max_grad_norm}))
        return t.OptimStep(adapter=self._version(target), grad_norm=norm, gradients_applied=applied)

    # -------------------------------------------------------------------------------------------- helpers

    def _adapter(self, name):
        return self.server.adapters[name or self.ppo_adapter_name]

    def _logits(self, adapter):
        return self.server.reference + adapter.weights[:, :VOCABULARY]

    def _ids(self, content):
        return encode(content) if isinstance(content, str) else [int(token) for token in content]

    def _steps(self, sequence):
        """Each completion token's predecessor, and the token."""
        tokens = np.array(self._ids(sequence.completion))
        return np.array([self._ids(sequence.prompt)[-1], *tokens[:-1]]), tokens

    def _reward(self, name, tokens):
        if name == "good":
            return float(np.mean(tokens == GOOD))
        if name == "long":
            return float(len(tokens))
        raise NotFoundError(f"no adapter {name!r}")

    def _version(self, adapter):
        return t.AdapterVersion(adapter.name, adapter.version)

    def _check_pending(self, adapter, expected):
        if expected is not None and adapter.pending < expected:
            raise FailedPreconditionError(f"{adapter.pending} pending, not {expected}", reason="GRADIENTS_LOST")

    def _check_version(self, adapter, expected):
        if expected is not None and expected != adapter.version:
            raise AbortedError(f"{adapter.name} is at version {adapter.version}, not {expected}")


class ToyBatch:
    """The tokens of a forward and backward pass, end to end; its losses add their gradients to the adapter."""

    def __init__(self, session, target, sequences):
        self.target, self.sequences = target, sequences
        rows = [session._steps(row) for row in sequences]
        self.before, self.tokens = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        lengths = [len(tokens) for _, tokens in rows]
        masks = [np.ones(n, bool) if row.mask is None else row.mask for row, n in zip(sequences, lengths, strict=True)]
        self.mask = np.concatenate(masks)
        self.table = log_softmax(session._logits(target))
        self.logprobs, self.values = self.table[self.before, self.tokens], target.weights[self.before, VOCABULARY]
        self.weights = self.mask * (1.0 if sequences[0].weights is None else self.of("weights"))

    def of(self, name):
        return np.concatenate([getattr(row, name) for row in self.sequences]).astype(np.float64)

    def mean(self, x):
        return float((x * self.mask).sum() / self.mask.sum())

    @property
    def entropy(self):
        return self.mean(-(np.exp(self.table) * self.table).sum(axis=1)[self.before])

    def backward(self, d_logprob, d_value):
        np.add.at(self.target.gradients, (self.before, self.tokens), d_logprob)
        spread = d_logprob[:, None] * np.exp(self.table[self.before])
        np.subtract.at(self.target.gradients[:, :VOCABULARY], self.before, spread)
        np.add.at(self.target.gradients[:, VOCABULARY], self.before, d_value)

    def cross_entropy(self, loss, count):
        self.backward(-self.weights / count, np.zeros(len(self.tokens)))
        return {"loss/total": float(-(self.logprobs * self.weights).sum() / count)}

    def dpo(self, loss, count):
        lengths = [len(row.completion) for row in self.sequences]
        rows = np.repeat(np.arange(len(lengths)), lengths)
        margins = np.bincount(rows, self.logprobs - self.of("reference_logprobs"))
        differences = margins[::2] - margins[1::2]
        d_margin = -loss.beta / (1 + np.exp(loss.beta * differences))
        signs = np.where(rows % 2 == 0, 1.0, -1.0)
        self.backward(d_margin[rows // 2] * signs / count, np.zeros(len(self.tokens)))
        return {"loss/total": float(np.logaddexp(0, -loss.beta * differences).sum() / count)}

    def custom(self, loss, count):
        assert self.sequences[0].advantages is None
        gradients = self.of("logprob_gradients")
        self.backward(gradients * self.weights / count, np.zeros(len(self.tokens)))
        return {"loss/total": float((gradients * self.logprobs * self.weights).sum() / count)}

    def ppo(self, loss, count):
        old_logprobs, advantages = self.of("old_logprobs"), self.of("advantages")
        high = loss.cliprange if loss.cliprange_high is None else loss.cliprange_high
        ratio = np.exp(self.logprobs - old_logprobs)
        free, clipped = -advantages * ratio, -advantages * np.clip(ratio, 1 - loss.cliprange, 1 + high)
        policy_loss = (np.maximum(free, clipped) * self.weights).sum() / count
        total, d_logprob = policy_loss, np.where(free >= clipped, free, 0.0)
        metrics = {}
        if loss.kl_coef:
            difference = self.of("reference_logprobs") - self.logprobs
            metrics["policy/kl"] = self.mean(np.exp(difference) - difference - 1)
            total += loss.kl_coef * ((np.exp(difference) - difference - 1) * self.weights).sum() / count
            d_logprob = d_logprob + loss.kl_coef * (1 - np.exp(difference))
        value, d_value = self.value(loss, count) if loss.vf_coef else ({"loss/value": 0.0}, 0.0)
        self.backward(d_logprob * self.weights / count, loss.vf_coef * d_value * self.weights / count)
        return metrics | {
            "loss/policy": float(policy_loss),
            "loss/total": float(total + loss.vf_coef * value["loss/value"]),
            "policy/approxkl": 0.5 * self.mean((self.logprobs - old_logprobs) ** 2),
            "policy/policykl": self.mean(old_logprobs - self.logprobs),
            "policy/clipfrac": self.mean(clipped > free),
            "policy/advantages_mean": self.mean(advantages),
            "policy/ratio": self.mean(ratio),
            **value,
        }

    def value(self, loss, count):
        old_values, returns = self.of("old_values"), self.of("returns")
        close = np.clip(self.values, old_values - loss.cliprange_value, old_values + loss.cliprange_value)
        free, clipped = (self.values - returns) ** 2, (close - returns) ** 2
        metrics = {
            "loss/value": float(0.5 * (np.maximum(free, clipped) * self.weights).sum() / count),
            "returns/mean": self.mean(returns),
            "returns/var": self.mean((returns - self.mean(returns)) ** 2),
            "val/vpred": self.mean(self.values),
            "val/error": self.mean(free),
            "val/clipfrac": self.mean(clipped > free),
            "val/mean": self.mean(old_values),
            "val/var": self.mean((old_values - self.mean(old_values)) ** 2),
        }
        return metrics, np.where(free >= clipped, self.values - returns, 0.0)

    def value_alone(self, loss, count):
        assert self.target.kind == "critic"
        metrics, d_value = self.value(loss, count)
        self.backward(np.zeros(len(self.tokens)), d_value * self.weights / count)
        return metrics | {"loss/total": metrics["loss/value"]}


def log_softmax(logits):
    """Row by row."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def policy_session(server=None, name="policy_1"):
    """A session with a fresh policy as its active adapter."""
    server = server or ToyServer()
    session = server.client().open_session()
    session.create_adapter(name)
    session.set_active(name)
    return session


def without_times(stats):
    """The numbers that do not depend on how fast the machine is."""
    timed = ("time/", "seconds")
    return {name: value for name, value in stats.items() if not name.startswith(timed)}
