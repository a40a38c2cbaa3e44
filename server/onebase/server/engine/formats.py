"""Adapters on disk: PEFT's directories, read and written so that plain PEFT and this server understand each other.

    adapter_config.json          PEFT's LoraConfig
    adapter_model.safetensors    base_model.model.{layer}.lora_{A,B}.weight; rewards: base_model.model.score.weight
    value_head.safetensors       v_head.summary.{weight,bias}, where there is a value head (TRL's names)
    optimizer.safetensors        AdamW's moments, where they were asked for
    client_state.bin             what the trainer keeps with the adapter, beside the moments: bytes, never looked into
    onebase.json                 version, kind, the base's fingerprint and precision, the tokenizer's fingerprint, and a
                                 SHA-256 of each file; of rewards also append_eos and pooling
    tokenizer.json, …            not written; where TRL wrote them, they must be the base's

PEFT resolves which layers an adapter targets, on a copy of the architecture without weights. Pickle is never opened.
"""

from __future__ import annotations

import copy
import logging
import math
import re
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from onebase.server.engine.adapters import Adapter, Head, Moments, Weights
from onebase.server.engine.files import CLIENT_STATE, SavedFiles, write_directory
from onebase.server.engine.lora import LoraPair
from onebase.server.engine.settings import (
    HEAD_NAMES,
    check_config,
    known_names,
    lora_config,
    read_config,
    told,
    trainable_config,
)
from onebase.server.engine.tensors import StoredTensors
from onebase.server.engine.tokenizer_check import TokenizerCheck
from onebase.server.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from onebase.server.jobs import (
    AdapterKind,
    BaseFacts,
    ClientState,
    CreateAdapterJob,
    LoadAdapterJob,
    Pooling,
    SaveResult,
    precision,
)
from onebase.server.patterns import Budget, PatternError, assigned, matching
from onebase.server.walls import STAMP

log = logging.getLogger(__name__)

PREFIX = "base_model.model."

_MAX_TOLD = 512
"""Characters of what PEFT says: it spells out all of a client's lists."""
_TRAINED_COPIES = 4
"""What training keeps of each parameter: weights, gradients, two moments."""
_HEAD_TENSORS = 2
"""A head's weight and bias."""
_MAX_STEP = 2**53


@dataclass(frozen=True)
class Target:
    """A layer that an adapter adapts."""

    rank: int
    scaling: float
    in_features: int
    out_features: int


class Formats:
    """Makes, reads and writes adapters of one base; several threads may do so at once.

    Args:
        skeleton: the base's architecture on the meta device, without weights.
        layers: the names of the layers that the engine can adapt.
        facts: the base.
        tokenizer: its tokenizer, which adapters must have been trained with.
        products: the dtype of the products that adapters' tensors take part in.
        conv1d: whether its linear layers are transformers' Conv1D.
    """

    def __init__(
        self,
        skeleton: PreTrainedModel,
        layers: set[str],
        facts: BaseFacts,
        tokenizer: TokenizerCheck,
        products: torch.dtype,
        *,
        conv1d: bool,
    ) -> None:
        self._skeleton = skeleton
        self._layers = layers
        self._facts = facts
        self._tokenizer = tokenizer
        self._conv1d = conv1d
        self._placing = threading.Lock()  # meanwhile PEFT changes how torch makes parameters, for all threads
        self._device = torch.device(facts.device)
        self._dtype = products

    # --------------------------------------------------------------------------------------------------- make

    def create(self, job: CreateAdapterJob) -> Adapter:
        """A fresh policy or critic: A as PEFT begins it (Kaiming uniform), B zero; its head as torch begins it."""
        config = lora_config(job.lora, conv1d=self._conv1d, base=self._facts.model)
        targets = self.targets(config, "lora.target_modules")
        check_room(targets, job, self._device, "lora")
        random = torch.Generator().manual_seed(job.seed)
        lora = {}
        for name, target in targets.items():
            a = torch.empty(target.rank, target.in_features)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=random)
            b = torch.zeros(target.out_features, target.rank)
            lora[name] = LoraPair.of(self._parameter(a), self._parameter(b), target.scaling, self._dtype)
        weights = Weights(job.least_version, lora, value_head=self._fresh_head(random) if job.value_head else None)
        return Adapter(job.uid, job.name, job.kind, config, weights)

    def copy(self, job: CreateAdapterJob, source: Adapter) -> Adapter:
        """A policy or critic that begins with the source's LoRA, and with its value head if it has one.

        A critic takes over a score head of one label as its value head.

        Raises:
            FailedPrecondition: the score head has several labels.
        """
        old = source.weights
        shapes = {
            name: Target(pair.a.shape[0], pair.scaling, pair.a.shape[1], pair.b.shape[0])
            for name, pair in old.lora.items()
        }
        check_room(shapes, job, self._device, "init_from")
        lora = {
            name: LoraPair.of(self._parameter(pair.a), self._parameter(pair.b), pair.scaling, self._dtype)
            for name, pair in old.lora.items()
        }
        head = None
        if job.value_head:
            head = old.value_head
            if job.kind is AdapterKind.CRITIC and old.score_head is not None:
                head = _as_value_head(old.score_head, source.name, "init_from")
            head = self._fresh_head(torch.Generator().manual_seed(job.seed)) if head is None else self._own_head(head)
        config = trainable_config(source.config, self._facts.model)
        return Adapter(job.uid, job.name, job.kind, config, Weights(job.least_version, lora, value_head=head))

    def _own_head(self, head: Head, *, trainable: bool = True) -> Head:
        bias = None if head.bias is None else self._parameter(head.bias, trainable=trainable)
        return Head(self._parameter(head.weight, trainable=trainable), bias)

    def _parameter(self, tensor: torch.Tensor, *, trainable: bool = True) -> torch.Tensor:
        own = torch.empty(tensor.shape, device=self._device, dtype=torch.float32)
        return own.copy_(tensor.detach()).requires_grad_(
            trainable
        )  # not the mapped file's memory, whatever its alignment

    def _fresh_head(self, random: torch.Generator) -> Head:
        hidden = self._facts.hidden_size
        bound = 1 / math.sqrt(hidden)
        weight = torch.empty(1, hidden).uniform_(-bound, bound, generator=random)
        bias = torch.empty(1).uniform_(-bound, bound, generator=random)
        return Head(self._parameter(weight), self._parameter(bias))

    def targets(self, config: LoraConfig, field: str) -> dict[str, Target]:
        """The layers a configuration means, as PEFT finds them on this architecture.

        PEFT is given no regular expression of a client's: what they match is found by `patterns`.

        Raises:
            InvalidArgument: BAD_PATTERN: one takes too long to match.
            FailedPrecondition: it means none, or one that is not a linear layer inside the blocks.
        """
        plain = copy.copy(config)
        plain.modules_to_save = None
        plain.inference_mode = False
        plain.rank_pattern, plain.alpha_pattern = {}, {}
        budget = Budget()
        try:
            ranks = assigned(config.rank_pattern or {}, self._layers, budget)
            alphas = assigned(config.alpha_pattern or {}, self._layers, budget)
            plain.target_modules = self._spelled(config.target_modules, budget)
            plain.exclude_modules = self._spelled(config.exclude_modules, budget)
        except PatternError as error:
            raise InvalidArgument("BAD_PATTERN", f"a pattern of the adapter's modules: {error}", field=field) from None
        try:
            with self._placing:
                model = inject_adapter_in_model(plain, copy.deepcopy(self._skeleton), low_cpu_mem_usage=True)
        except (ValueError, TypeError, AttributeError, LookupError, OverflowError, re.error) as error:
            raise FailedPrecondition(
                "TARGET_MODULES_NOT_FOUND",
                f"PEFT cannot place this adapter on {self._facts.architecture}: {str(error)[:_MAX_TOLD]}",
                field=field,
            ) from error
        found: dict[str, Target] = {}
        for name, module in model.named_modules():
            if not isinstance(module, LoraLayer):
                continue
            if name not in self._layers:
                raise FailedPrecondition(
                    "TARGET_MODULE_NOT_SUPPORTED",
                    f"target module {name!r} is not a linear layer inside the transformer's blocks: leave it out of "
                    "target_modules (embeddings and the output layer are shared by all adapters)",
                    field=field,
                )
            rank, alpha = ranks.get(name, config.r), alphas.get(name, config.lora_alpha)
            scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
            if not abs(scaling) <= torch.finfo(self._dtype).max:
                raise InvalidArgument(
                    "BAD_CONFIG", f"an alpha of {alpha} is infinite in {self._dtype}: use a smaller one", field=field
                )
            found[name] = Target(rank, scaling, int(module.in_features), int(module.out_features))
        return found

    def _spelled(self, modules: str | Collection[str] | None, budget: Budget) -> str | Collection[str] | None:
        """A regular expression as the names that it matches, in one that is no more than these; a list shortened."""
        if modules is None or (isinstance(modules, str) and modules.lower() == "all-linear"):
            return modules
        names = [name for name, _ in self._skeleton.named_modules() if name]
        if isinstance(modules, str):
            names = matching(modules, names, budget)
            return "|".join(map(re.escape, names)) if names else ()
        return known_names(set(modules), names)

    # --------------------------------------------------------------------------------------------------- read

    def load(self, job: LoadAdapterJob, max_rank: int, targets: Mapping[str, Target] | None = None) -> Adapter:
        """Reads a PEFT directory.

        Args:
            job: what to read.
            max_rank: larger ones are refused.
            targets: the layers that its configuration means, where they are known; None has PEFT find them.

        Raises:
            NotFound, InvalidArgument, FailedPrecondition, ResourceExhausted, DataLoss: each with a reason of its own
            and a message that says what to do.
        """
        files = SavedFiles(job.path)
        manifest = files.manifest()
        self._check_base(manifest, job.path)
        self._compare_precision(manifest, job.name)
        self._tokenizer.check(job.path, manifest)
        config = read_config(files)
        check_config(config, job.kind)
        ranks = [config.r, *(config.rank_pattern or {}).values()]
        if max(ranks) > max_rank:
            raise ResourceExhausted(
                "RANK_TOO_LARGE", f"r={max(ranks)} is over this server's limit of {max_rank}", field="path"
            )
        if targets is None:
            targets = self.targets(config, "path")
        check_room(targets, job, self._device, "path")
        tensors = files.tensors(files.adapter(), 2 * len(targets) + _HEAD_TENSORS)
        lora = {name: self._read_pair(name, target, tensors, job.kind.trained) for name, target in targets.items()}
        value_head, score_head = self._heads(job, files, tensors)
        strange = tensors.left()
        if strange:
            raise FailedPrecondition(
                "UNKNOWN_TENSORS",
                f"{job.path} holds tensors that belong to nothing here: {', '.join(map(told, strange[:3]))}; "
                "was it trained on another architecture?",
                field="path",
            )
        version = max(int(manifest.get("version", 0)), job.least_version)
        weights = Weights(version, lora, value_head, score_head)
        if job.kind is AdapterKind.CRITIC:
            config = trainable_config(config, self._facts.model)
        adapter = Adapter(job.uid, job.name, job.kind, config, weights)
        if job.kind is AdapterKind.REWARD:
            self._declare(adapter, job, manifest)
        if job.with_optimizer:
            adapter.moments = self._read_moments(files, weights)
            adapter.client_state = _read_client_state(files, manifest, version)
        return adapter

    def _check_base(self, manifest: dict[str, Any], path: Path) -> None:
        theirs = manifest.get("base", {}).get("fingerprint")
        if theirs is not None and theirs != self._facts.fingerprint:
            raise FailedPrecondition(
                "WRONG_BASE",
                f"{path} was saved from the base {told(manifest['base'].get('model'))} ({told(theirs[:12])}), and this "
                f"server has {self._facts.model!r} ({self._facts.fingerprint[:12]}): serve that base, or train a new "
                "adapter",
                field="path",
            )

    def _compare_precision(self, manifest: dict[str, Any], name: str) -> None:
        """Warns where the adapter was saved from the same base in another precision."""
        base = manifest.get("base", {})
        if "dtype" not in base:
            return
        theirs = precision(base["dtype"], base.get("quantization", "none"))
        if theirs != self._facts.precision:
            log.warning(
                "adapter %r was trained on the base in %s, and this server has it in %s: it was fitted to the other's "
                "rounding, so its logprobs, values and rewards shift, and a policy that goes on training may not "
                "converge. Serve the base as it was then (--dtype, --quantization), or watch the first rewards and KL",
                name,
                told(theirs),
                self._facts.precision,
            )

    def _read_pair(self, name: str, target: Target, tensors: StoredTensors, trainable: bool) -> LoraPair:
        a = tensors.take(f"{PREFIX}{name}.lora_A.weight", (target.rank, target.in_features), self._dtype)
        b = tensors.take(f"{PREFIX}{name}.lora_B.weight", (target.out_features, target.rank), self._dtype)
        a, b = (self._parameter(tensor, trainable=trainable) for tensor in (a, b))
        return LoraPair.of(a, b, target.scaling, self._dtype)

    def _heads(self, job: LoadAdapterJob, files: SavedFiles, tensors: StoredTensors) -> tuple[Head | None, Head | None]:
        """The value head and the score head that an adapter of this kind has, one of them at most."""
        score = self._read_score(tensors) if job.kind in (AdapterKind.REWARD, AdapterKind.CRITIC) else None
        if job.kind is AdapterKind.REWARD:
            if score is None:
                raise FailedPrecondition(
                    "MISSING_SCORE_HEAD",
                    "the adapter has no score head: train it with LoraConfig(task_type='SEQ_CLS'), which keeps the "
                    "head; without a task_type PEFT saves none",
                    field="path",
                )
            return None, self._own_head(score, trainable=False)
        if not job.kind.trained:
            return None, None
        value = self._read_value_head(files)
        if value is None and score is not None:
            value = _as_value_head(score, str(job.path), "path")
        if value is not None:
            return self._own_head(value), None
        if job.value_head:
            return self._fresh_head(torch.Generator().manual_seed(job.seed)), None
        if job.kind is AdapterKind.CRITIC:
            raise FailedPrecondition(
                "MISSING_VALUE_HEAD",
                f"{job.path} holds neither a value head nor a score head, and a critic has one: set value_head for a "
                "fresh one",
                field="value_head",
            )
        return None, None

    def _read_score(self, tensors: StoredTensors) -> Head | None:
        for head in HEAD_NAMES:
            key = f"{PREFIX}{head}.weight"
            if key in tensors:
                labels = int((*tensors.shape(key), 1)[0])
                weight = tensors.take(key, (labels, self._facts.hidden_size))
                bias = f"{PREFIX}{head}.bias"
                return Head(weight, tensors.take(bias, (labels,)) if bias in tensors else None)
        return None

    def _read_value_head(self, files: SavedFiles) -> Head | None:
        path = files.path / "value_head.safetensors"
        if not path.exists():
            return None
        tensors = files.tensors(path, _HEAD_TENSORS)
        weight = tensors.take("v_head.summary.weight", (1, self._facts.hidden_size))
        return Head(weight, tensors.take("v_head.summary.bias", (1,)))

    def _declare(self, adapter: Adapter, job: LoadAdapterJob, manifest: dict[str, Any]) -> None:
        """Says how a reward reads: as the job does, or else the manifest."""
        written = manifest.get("append_eos")
        if not (written is None or isinstance(written, bool)):
            raise _bad_manifest("append_eos", written, "true or false")
        adapter.append_eos = written if job.append_eos is None else job.append_eos
        rule = manifest.get("pooling", adapter.pooling.value)
        if rule not in [known.value for known in Pooling]:
            raise _bad_manifest("pooling", rule, " or ".join(known.value for known in Pooling))
        adapter.pooling = job.pooling or Pooling(rule)
        if adapter.append_eos and not self._facts.eos_token_ids:
            raise FailedPrecondition(
                "NO_EOS_TOKEN",
                f"{job.path} shall be read with an end-of-sequence token appended, and this base has none: set "
                "append_eos to no",
                field="append_eos",
            )

    def _read_moments(self, files: SavedFiles, weights: Weights) -> Moments:
        path = files.path / "optimizer.safetensors"
        if not path.exists():
            raise FailedPrecondition(
                "NO_OPTIMIZER_STATE",
                f"{files.path} holds no optimizer state: load it without with_optimizer",
                field="with_optimizer",
            )
        moments = Moments.zeros(weights.parameters())
        tensors = files.tensors(path, 1 + 2 * len(moments.exp_avg))
        moments.step = int(tensors.take("step", ()))
        if not 0 <= moments.step < _MAX_STEP:
            raise _bad_moments("step", f"is {moments.step}", f"0 to {_MAX_STEP - 1}")
        for part, store in (("exp_avg", moments.exp_avg), ("exp_avg_sq", moments.exp_avg_sq)):
            for name, like in store.items():
                read = tensors.take(f"{part}.{name}", tuple(like.shape))
                if part == "exp_avg_sq" and bool((read < 0).any()):
                    raise _bad_moments(f"{part}.{name}", "holds negative numbers", "a mean of squares")
                like.copy_(read)
        return moments

    # -------------------------------------------------------------------------------------------------- write

    def save(
        self, adapter: Adapter, path: Path, *, with_optimizer: bool, overwrite: bool, stamp: str = ""
    ) -> SaveResult:
        """Writes a PEFT directory, whole or not at all.

        Raises:
            AlreadyExists: the path is taken and `overwrite` is not set.
        """
        weights = adapter.weights
        state = {}
        for name, pair in weights.lora.items():
            state[f"{PREFIX}{name}.lora_A.weight"] = pair.a
            state[f"{PREFIX}{name}.lora_B.weight"] = pair.b
        if weights.score_head is not None:
            state[f"{PREFIX}score.weight"] = weights.score_head.weight
            if weights.score_head.bias is not None:
                state[f"{PREFIX}score.bias"] = weights.score_head.bias
        files = {"adapter_model.safetensors": state}
        if weights.value_head is not None and weights.value_head.bias is not None:
            files["value_head.safetensors"] = {
                "v_head.summary.weight": weights.value_head.weight,
                "v_head.summary.bias": weights.value_head.bias,
            }
        if with_optimizer and adapter.moments is not None:
            files["optimizer.safetensors"] = _moments_state(adapter.moments)
        elif with_optimizer:
            files["optimizer.safetensors"] = _moments_state(Moments.zeros(weights.parameters()))
        config = copy.copy(adapter.config)
        config.inference_mode = True
        kept = adapter.client_state
        manifest: dict[str, Any] = {
            "format": 1,
            "kind": adapter.kind.value,
            "version": weights.version,
            "base": base_entry(self._facts),
            "tokenizer": self._tokenizer.manifest,
        }
        if adapter.kind is AdapterKind.REWARD:
            manifest |= {"append_eos": adapter.append_eos, "pooling": adapter.pooling.value}
        if kept.data:
            manifest["client_state"] = kept.version
        if stamp:
            manifest[STAMP] = stamp

        def fill(folder: Path) -> None:
            config.save_pretrained(str(folder))
            for name, tensors in files.items():
                own = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
                save_file(own, folder / name, {"format": "pt"})
            if kept.data:
                (folder / CLIENT_STATE).write_bytes(kept.data)

        size = write_directory(path, fill, manifest, overwrite=overwrite)
        return SaveResult(path, weights.version, size)


def base_entry(facts: BaseFacts) -> dict[str, str]:
    """What a manifest says of the base."""
    return {
        "model": facts.model,
        "fingerprint": facts.fingerprint,
        "dtype": facts.dtype,
        "quantization": facts.quantization,
    }


def _read_client_state(files: SavedFiles, manifest: dict[str, Any], version: int) -> ClientState:
    """What the trainer kept with an adapter that gets this version here.

    Raises:
        DataLoss, InvalidArgument: it is not what was written, or too long.
    """
    written = manifest.get("client_state", 0)
    if not isinstance(written, int) or not 0 <= written <= _MAX_STEP:
        raise _bad_manifest("client_state", written, "a version")
    data = files.client_state()
    return ClientState(data, version if written == manifest.get("version", 0) else written) if data else ClientState()


def _bad_moments(key: str, what: str, wanted: str) -> InvalidArgument:
    return InvalidArgument(
        "BAD_OPTIMIZER_STATE",
        f"tensor {key!r} of the optimizer's state {what}: use {wanted}, or load it without with_optimizer",
        field="path",
    )


def _moments_state(moments: Moments) -> dict[str, torch.Tensor]:
    state = {"step": torch.tensor(moments.step)}
    state |= {f"exp_avg.{name}": tensor for name, tensor in moments.exp_avg.items()}
    state |= {f"exp_avg_sq.{name}": tensor for name, tensor in moments.exp_avg_sq.items()}
    return state


def _as_value_head(score: Head, what: str, field: str) -> Head:
    """A score head of one label as a value head; the bias is 0 where it has none.

    Raises:
        FailedPrecondition: it has several labels.
    """
    labels = score.weight.shape[0]
    if labels != 1:
        raise FailedPrecondition(
            "SEVERAL_LABELS",
            f"the score head of {what} has {labels} labels, and a value head has one: begin from a reward of one label",
            field=field,
        )
    return Head(score.weight, torch.zeros(1) if score.bias is None else score.bias)


def _bad_manifest(key: str, value: object, wanted: str) -> InvalidArgument:
    return InvalidArgument("BAD_MANIFEST", f"onebase.json says {key} is {told(value)}: use {wanted}", field="path")


def check_room(
    targets: Mapping[str, Target], job: CreateAdapterJob | LoadAdapterJob, device: torch.device, field: str
) -> None:
    """Refuses an adapter that is too large, by its shape alone, before anything is allocated.

    Raises:
        ResourceExhausted: QUOTA_ADAPTER_BYTES, NO_MEMORY.
    """
    parameters = sum(target.rank * (target.in_features + target.out_features) for target in targets.values())
    wanted = 4 * parameters * (_TRAINED_COPIES if job.kind.trained else 1)
    if job.max_bytes is not None and wanted > job.max_bytes:
        raise ResourceExhausted(
            "QUOTA_ADAPTER_BYTES",
            f"adapter {job.name!r} takes {wanted} bytes, with gradients and moments if it is trained, and the quota "
            f"has {job.max_bytes} left: use a smaller rank or fewer target modules, or delete an adapter",
            field=field,
        )
    there = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if wanted > there:
        raise ResourceExhausted(
            "NO_MEMORY",
            f"adapter {job.name!r} takes {wanted} bytes, with gradients and moments if it is trained, and {device} has "
            f"{there} left: use a smaller rank or fewer target modules",
            field=field,
        )
