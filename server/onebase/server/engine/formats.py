"""Adapters on disk: PEFT's directories, read and written so that plain PEFT and this server understand each other.

    adapter_config.json          PEFT's LoraConfig
    adapter_model.safetensors    base_model.model.{layer}.lora_{A,B}.weight; rewards: base_model.model.score.weight
    value_head.safetensors       v_head.summary.{weight,bias}, where there is a value head (TRL's names)
    optimizer.safetensors        AdamW's moments, where they were asked for
    onebase.json                 version, kind, the base's fingerprint and precision, and a SHA-256 of each file

PEFT resolves which layers an adapter targets, on a copy of the architecture without weights. Pickle is never opened.
What we do not compute the way PEFT does is refused by the name of its setting.
"""

from __future__ import annotations

import copy
import logging
import math
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from onebase.server.engine.adapters import Adapter, Head, Moments, Weights
from onebase.server.engine.files import SavedFiles, write_directory
from onebase.server.engine.lora import LoraPair
from onebase.server.engine.precision import widens
from onebase.server.errors import FailedPrecondition, InvalidArgument, OnebaseError, ResourceExhausted
from onebase.server.jobs import (
    AdapterKind,
    BaseFacts,
    CreateAdapterJob,
    LoadAdapterJob,
    LoraSpec,
    SaveResult,
    precision,
)

log = logging.getLogger(__name__)

PREFIX = "base_model.model."
HEAD_NAMES = ("score", "classifier")

_UNDERSTOOD = {
    *(
        "task_type",
        "peft_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "peft_version",
    ),
    *("r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("layers_to_transform", "layers_pattern", "fan_in_fan_out", "lora_dropout", "modules_to_save", "runtime_config"),
    *("init_lora_weights", "eva_config", "loftq_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
}
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin that leave the base's weights as they are."""


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
        conv1d: whether its linear layers are transformers' Conv1D.
    """

    def __init__(self, skeleton: PreTrainedModel, layers: set[str], facts: BaseFacts, *, conv1d: bool) -> None:
        self._skeleton = skeleton
        self._layers = layers
        self._facts = facts
        self._conv1d = conv1d
        self._placing = threading.Lock()  # meanwhile PEFT changes how torch makes parameters, for all threads
        self._device = torch.device(facts.device)
        dtype: torch.dtype = getattr(torch, facts.dtype)
        self._dtype = torch.float32 if widens(dtype, torch.device(facts.device)) else dtype  # of products

    # --------------------------------------------------------------------------------------------------- make

    def create(self, job: CreateAdapterJob) -> Adapter:
        """A fresh policy: A as PEFT begins it (Kaiming uniform), B zero; the value head as torch begins a Linear."""
        config = lora_config(job.lora, conv1d=self._conv1d, base=self._facts.model)
        targets = self.targets(config, "lora.target_modules")
        random = torch.Generator().manual_seed(job.seed)
        lora = {}
        for name, target in targets.items():
            a = torch.empty(target.rank, target.in_features)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=random)
            b = torch.zeros(target.out_features, target.rank)
            lora[name] = LoraPair.of(self._parameter(a), self._parameter(b), target.scaling, self._dtype)
        weights = Weights(0, lora, value_head=self._fresh_head(random) if job.value_head else None)
        return Adapter(job.uid, job.name, AdapterKind.POLICY, config, weights)

    def _parameter(self, tensor: torch.Tensor, *, trainable: bool = True) -> torch.Tensor:
        own = torch.empty(tensor.shape, device=self._device, dtype=torch.float32)
        return own.copy_(tensor).requires_grad_(trainable)  # not the mapped file's memory, whatever its alignment

    def _fresh_head(self, random: torch.Generator) -> Head:
        hidden = self._facts.hidden_size
        bound = 1 / math.sqrt(hidden)
        weight = torch.empty(1, hidden).uniform_(-bound, bound, generator=random)
        bias = torch.empty(1).uniform_(-bound, bound, generator=random)
        return Head(self._parameter(weight), self._parameter(bias))

    def targets(self, config: LoraConfig, field: str) -> dict[str, Target]:
        """The layers a configuration means, as PEFT finds them on this architecture.

        Raises:
            FailedPrecondition: it means none, or one that is not a linear layer inside the blocks.
        """
        plain = copy.copy(config)
        plain.modules_to_save = None
        plain.inference_mode = False
        try:
            with self._placing:
                model = inject_adapter_in_model(plain, copy.deepcopy(self._skeleton), low_cpu_mem_usage=True)
        except (ValueError, TypeError, AttributeError, re.error) as error:
            raise FailedPrecondition(
                "TARGET_MODULES_NOT_FOUND",
                f"PEFT cannot place this adapter on {self._facts.architecture}: {error}",
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
            rank, scaling = int(module.r["default"]), float(module.scaling["default"])
            found[name] = Target(rank, scaling, int(module.in_features), int(module.out_features))
        return found

    # --------------------------------------------------------------------------------------------------- read

    def load(self, job: LoadAdapterJob, max_rank: int) -> Adapter:
        """Reads a PEFT directory.

        Raises:
            NotFound, InvalidArgument, FailedPrecondition, ResourceExhausted, DataLoss: each with a reason of its own
            and a message that says what to do.
        """
        files = SavedFiles(job.path)
        manifest = files.manifest()
        self._check_base(manifest, job.path)
        self._compare_precision(manifest, job.name)
        config = read_config(files)
        check_config(config, job.kind)
        ranks = [config.r, *(config.rank_pattern or {}).values()]
        if max(ranks) > max_rank:
            raise ResourceExhausted(
                "RANK_TOO_LARGE", f"r={max(ranks)} is over this server's limit of {max_rank}", field="path"
            )
        targets = self.targets(config, "path")
        trainable = job.kind is AdapterKind.POLICY
        tensors = files.tensors(files.adapter())
        lora = {name: self._read_pair(name, target, tensors, trainable) for name, target in targets.items()}
        score = self._read_score(tensors) if job.kind is AdapterKind.REWARD else None
        if tensors:
            raise FailedPrecondition(
                "UNKNOWN_TENSORS",
                f"{job.path} holds tensors that belong to nothing here: {', '.join(sorted(tensors)[:3])}; "
                "was it trained on another architecture?",
                field="path",
            )
        version = max(int(manifest.get("version", 0)), job.least_version)
        weights = Weights(version, lora, self._read_value_head(job, files), score)
        adapter = Adapter(job.uid, job.name, job.kind, config, weights)
        if job.with_optimizer:
            adapter.moments = self._read_moments(files, weights)
        return adapter

    def _check_base(self, manifest: dict[str, Any], path: Path) -> None:
        theirs = manifest.get("base", {}).get("fingerprint")
        if theirs is not None and theirs != self._facts.fingerprint:
            raise FailedPrecondition(
                "WRONG_BASE",
                f"{path} was saved from the base {manifest['base'].get('model')!r} ({theirs[:12]}), and this server "
                f"has {self._facts.model!r} ({self._facts.fingerprint[:12]}): serve that base, or train a new adapter",
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
                theirs,
                self._facts.precision,
            )

    def _read_pair(self, name: str, target: Target, tensors: dict[str, torch.Tensor], trainable: bool) -> LoraPair:
        a = _take(tensors, f"{PREFIX}{name}.lora_A.weight", (target.rank, target.in_features))
        b = _take(tensors, f"{PREFIX}{name}.lora_B.weight", (target.out_features, target.rank))
        a, b = (self._parameter(tensor, trainable=trainable) for tensor in (a, b))
        return LoraPair.of(a, b, target.scaling, self._dtype)

    def _read_score(self, tensors: dict[str, torch.Tensor]) -> Head:
        for head in HEAD_NAMES:
            key = f"{PREFIX}{head}.weight"
            if key in tensors:
                labels = tensors[key].shape[0]
                if labels != 1:
                    raise FailedPrecondition(
                        "SEVERAL_LABELS",
                        f"the score head has {labels} labels; a reward needs num_labels=1",
                        field="path",
                    )
                weight = _take(tensors, key, (1, self._facts.hidden_size))
                bias = tensors.pop(f"{PREFIX}{head}.bias", None)
                return Head(
                    self._parameter(weight, trainable=False),
                    None if bias is None else self._parameter(bias, trainable=False),
                )
        raise FailedPrecondition(
            "MISSING_SCORE_HEAD",
            "the adapter has no score head: train it with LoraConfig(task_type='SEQ_CLS'), which keeps the head; "
            "without a task_type PEFT saves none",
            field="path",
        )

    def _read_value_head(self, job: LoadAdapterJob, files: SavedFiles) -> Head | None:
        path = files.path / "value_head.safetensors"
        if job.kind is AdapterKind.POLICY and path.exists():
            tensors = files.tensors(path)
            weight = _take(tensors, "v_head.summary.weight", (1, self._facts.hidden_size))
            bias = _take(tensors, "v_head.summary.bias", (1,))
            return Head(self._parameter(weight), self._parameter(bias))
        return self._fresh_head(torch.Generator().manual_seed(job.seed)) if job.value_head else None

    def _read_moments(self, files: SavedFiles, weights: Weights) -> Moments:
        path = files.path / "optimizer.safetensors"
        if not path.exists():
            raise FailedPrecondition(
                "NO_OPTIMIZER_STATE",
                f"{files.path} holds no optimizer state: load it without with_optimizer",
                field="with_optimizer",
            )
        tensors = files.tensors(path)
        moments = Moments.zeros(weights.parameters())
        moments.step = int(_take(tensors, "step", ()))
        for part, store in (("exp_avg", moments.exp_avg), ("exp_avg_sq", moments.exp_avg_sq)):
            for name, like in store.items():
                like.copy_(_take(tensors, f"{part}.{name}", tuple(like.shape)))
        return moments

    # -------------------------------------------------------------------------------------------------- write

    def save(self, adapter: Adapter, path: Path, *, with_optimizer: bool, overwrite: bool) -> SaveResult:
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
        manifest = {
            "format": 1,
            "kind": adapter.kind.value,
            "version": weights.version,
            "base": base_entry(self._facts),
        }

        def fill(folder: Path) -> None:
            config.save_pretrained(str(folder))
            for name, tensors in files.items():
                own = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
                save_file(own, folder / name, {"format": "pt"})

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


def _moments_state(moments: Moments) -> dict[str, torch.Tensor]:
    state = {"step": torch.tensor(moments.step)}
    state |= {f"exp_avg.{name}": tensor for name, tensor in moments.exp_avg.items()}
    state |= {f"exp_avg_sq.{name}": tensor for name, tensor in moments.exp_avg_sq.items()}
    return state


def _take(tensors: dict[str, torch.Tensor], key: str, shape: tuple[int, ...]) -> torch.Tensor:
    tensor = tensors.pop(key, None)
    if tensor is None:
        raise FailedPrecondition(
            "MISSING_TENSOR",
            f"the adapter has no tensor {key!r}: was it trained on another architecture?",
            field="path",
        )
    if tuple(tensor.shape) != shape:
        raise FailedPrecondition(
            "WRONG_BASE",
            f"tensor {key!r} has shape {tuple(tensor.shape)}, and this base needs {shape}: the adapter belongs to "
            "another base model",
            field="path",
        )
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidArgument("NONFINITE_TENSOR", f"tensor {key!r} holds NaN or infinity", field="path")
    return tensor


def lora_config(spec: LoraSpec, *, conv1d: bool, base: str) -> LoraConfig:
    """Our words in PEFT's."""
    targets: str | list[str] = list(spec.target_modules)
    if spec.target_modules == ("all-linear",):
        targets = "all-linear"
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=spec.rank,
        lora_alpha=int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        target_modules=targets,
        use_rslora=spec.use_rslora,
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern=dict(spec.alpha_pattern),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=conv1d,
    )


def read_config(files: SavedFiles) -> LoraConfig:
    """adapter_config.json as PEFT's LoraConfig.

    Raises:
        FailedPrecondition: it is not a LoRA, or has settings that this PEFT does not know.
    """
    raw = files.config()
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise FailedPrecondition(
            "NOT_LORA", f"peft_type is {kind!r}: only LORA adapters can share a base here", field="path"
        )
    known = {name: value for name, value in raw.items() if name in LoraConfig.__dataclass_fields__}
    strange = sorted(name for name, value in raw.items() if name not in known and name not in _UNDERSTOOD and value)
    if strange:
        raise FailedPrecondition(
            "SETTING_NOT_SUPPORTED", f"adapter_config.json sets {strange[0]!r}, which is not known here", field="path"
        )
    known.pop("peft_type", None)
    try:
        config = LoraConfig(**known)
    except (TypeError, ValueError) as error:
        raise InvalidArgument("BAD_CONFIG", f"adapter_config.json of {files.path}: {error}", field="path") from error
    _check_form(config)
    return config


def _check_form(config: LoraConfig) -> None:
    """Refuses settings of a type that PEFT only trips over later.

    Raises:
        InvalidArgument: naming the first.
    """
    ranks, alphas, saved = config.rank_pattern or {}, config.alpha_pattern or {}, config.modules_to_save or []
    fine = {
        "r": type(config.r) is int,
        "lora_alpha": type(config.lora_alpha) in (int, float),
        "rank_pattern": isinstance(ranks, dict) and all(type(rank) is int for rank in ranks.values()),
        "alpha_pattern": isinstance(alphas, dict) and all(type(alpha) in (int, float) for alpha in alphas.values()),
        "modules_to_save": isinstance(saved, list | tuple | set) and all(isinstance(name, str) for name in saved),
    }
    for name, as_it_should in fine.items():
        if not as_it_should:
            raise InvalidArgument(
                "BAD_CONFIG",
                f"adapter_config.json has {name}={getattr(config, name)!r}, which PEFT's LoraConfig does not take",
                field="path",
            )


def check_config(config: LoraConfig, kind: AdapterKind) -> None:
    """Refuses, by name, every setting that would change numbers in a way we do not compute.

    Raises:
        FailedPrecondition: with the setting's name and value.
    """

    def refuse(setting: str, value: object, way_out: str) -> OnebaseError:
        return FailedPrecondition(
            "SETTING_NOT_SUPPORTED", f"{setting}={value!r} is not supported: {way_out}", field="path"
        )

    if config.use_dora:
        raise refuse(
            "use_dora",
            True,
            "DoRA divides by norms of the base's weights with the update merged in, so it has no product with the base "
            "that rows of other adapters could share; train a plain LoRA (use_dora=False)",
        )
    if config.bias != "none":
        raise refuse("bias", config.bias, "train with bias='none': biases belong to the shared base")
    if config.init_lora_weights not in _PLAIN_INITS:
        raise refuse(
            "init_lora_weights", config.init_lora_weights, "it changes the base: save it converted to plain LoRA"
        )
    extra = sorted(set(config.modules_to_save or ()) - set(HEAD_NAMES))
    if extra:
        raise refuse("modules_to_save", extra, "only a score head may be saved with an adapter")
    default = LoraConfig()
    for name in config.__dataclass_fields__:
        value = getattr(config, name)
        if name not in _UNDERSTOOD and value and value != getattr(default, name):
            raise refuse(name, value, "train the adapter without it")
    task = str(getattr(config.task_type, "value", config.task_type) or "")
    if kind is AdapterKind.REWARD and task not in ("SEQ_CLS", ""):
        raise FailedPrecondition(
            "WRONG_TASK_TYPE",
            f"task_type is {task!r}: a reward adapter needs SEQ_CLS, which keeps its score head",
            field="path",
        )
    if kind is not AdapterKind.REWARD and task not in ("CAUSAL_LM", ""):
        raise FailedPrecondition(
            "WRONG_TASK_TYPE",
            f"task_type is {task!r}: a {kind.value} needs CAUSAL_LM; load this one as a reward",
            field="path",
        )
