"""The base with one adapter merged into it, written as a plain transformers model.

    W' = W + scaling · B · A      for each layer that the adapter adapts, summed in float32, rounded once to W's dtype

Whoever loads the directory needs neither PEFT nor this server. Heads are not part of a causal LM and stay behind. The
base in memory is only read; the adapted layers' merged weights exist once more until they are written.

Source: LoRA, Hu et al. 2021 (arXiv:2106.09685), section 4.1.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onebase.server.engine.adapters import Adapter, Weights
from onebase.server.engine.files import write_directory
from onebase.server.engine.formats import base_entry
from onebase.server.engine.lora import LoraPair, MultiLoraLinear
from onebase.server.errors import FailedPrecondition
from onebase.server.jobs import AdapterKind, BaseFacts, SaveResult
from onebase.server.walls import STAMP

_WRAPPED = ".base"  # where a MultiLoraLinear keeps the layer of the base


class Merger:
    """Writes merged models of one base; any thread may do so, while others read the base.

    Args:
        model: the base, with MultiLoraLinear layers.
        skeleton: the same architecture as transformers has it, on the meta device.
        layers: the MultiLoraLinear layers by path.
        tokenizer: the base's.
        facts: the base.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        skeleton: PreTrainedModel,
        layers: Mapping[str, MultiLoraLinear],
        tokenizer: PreTrainedTokenizerBase,
        facts: BaseFacts,
    ) -> None:
        self._model = model
        self._skeleton = skeleton
        self._layers = layers
        self._tokenizer = tokenizer
        self._facts = facts

    def save(self, adapter: Adapter, path: Path, *, overwrite: bool, stamp: str = "") -> SaveResult:
        """Writes configuration, weights in the base's dtype and tokenizer, whole or not at all.

        Raises:
            AlreadyExists: the path is taken and `overwrite` is not set.
            FailedPrecondition: this base or this adapter cannot be merged; the message says why.
        """
        self._check(adapter)
        weights = adapter.weights

        def fill(folder: Path) -> None:
            shape = self._shape()
            try:
                shape.save_pretrained(folder, state_dict=self._merged(weights))
                self._tokenizer.save_pretrained(folder)
            except ValueError as error:
                raise FailedPrecondition(
                    "MODEL_NOT_SAVED",
                    f"transformers cannot save {self._facts.model!r}: {str(error).strip().splitlines()[0]}; save the "
                    "adapter without merged, and merge it with PEFT",
                    field="merged",
                ) from error

        manifest = {"format": 1, "merged": adapter.name, "version": weights.version, "base": base_entry(self._facts)}
        manifest |= {STAMP: stamp} if stamp else {}
        return SaveResult(path, weights.version, write_directory(path, fill, manifest, overwrite=overwrite))

    def _check(self, adapter: Adapter) -> None:
        facts = self._facts
        if facts.quantization != "none":
            raise FailedPrecondition(
                "QUANTIZED_BASE",
                f"this server keeps its base in {facts.quantization}, and what was rounded away cannot be merged back: "
                "serve the base without --quantization, or save the adapter without merged and merge it with PEFT",
                field="merged",
            )
        if adapter.kind not in (AdapterKind.POLICY, AdapterKind.REFERENCE):
            raise FailedPrecondition(
                "WRONG_ADAPTER_KIND",
                f"{adapter.name!r} is a {adapter.kind.value} adapter, whose head has no place in a causal LM: save it "
                "without merged",
                field="merged",
            )
        if self._skeleton.is_remote_code():
            raise FailedPrecondition(
                "REMOTE_CODE",
                f"{facts.architecture} is code that came with the model, which is not copied: save the adapter without "
                "merged, and merge it with PEFT",
                field="merged",
            )

    def _shape(self) -> PreTrainedModel:
        """The architecture without weights, with what is written beside them."""
        shape = copy.deepcopy(self._skeleton).to(self._model.dtype)
        shape.generation_config = copy.deepcopy(self._model.generation_config)
        # how the files' names became the model's when it was loaded, which saving turns round
        shape._weight_conversions = getattr(self._model, "_weight_conversions", None)
        return shape

    @torch.no_grad()
    def _merged(self, weights: Weights) -> dict[str, torch.Tensor]:
        """Every weight by its name in transformers; those that are not adapted are the base's own."""
        state = {self._plain(name): tensor for name, tensor in self._model.state_dict().items()}
        for name, pair in weights.lora.items():
            key = f"{name}.weight"
            conv1d = not isinstance(self._layers[name].base, nn.Linear)
            state[key] = _sum(state[key], pair, conv1d=conv1d).cpu()
        return state

    def _plain(self, name: str) -> str:
        """A weight's name without the layers of ours that it lies in."""
        module, _, leaf = name.rpartition(".")
        outer = module.removesuffix(_WRAPPED)
        return f"{outer}.{leaf}" if outer != module and outer in self._layers else name


def _sum(weight: torch.Tensor, pair: LoraPair, *, conv1d: bool) -> torch.Tensor:
    """W + scaling · B · A, [out, in] as W is, or [in, out] where W is a Conv1D's."""
    update = (pair.b.float() @ pair.a.float()) * pair.scaling
    return (weight.float() + (update.t() if conv1d else update)).to(weight.dtype)
