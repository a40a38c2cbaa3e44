"""What the server refuses, each thing with its status, its reason, its field and the way out."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle.fixtures import FIXTURES
from peft import LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from onebase.client import Client
from onebase.client.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    OnebaseError,
    PermissionDeniedError,
)
from onebase.client.types import AdapterKind, SamplingParams, Sequence

Make = Callable[[Path], None]

LLAMA = LlamaConfig.from_pretrained(FIXTURES / "base")


def _policy(config: PeftConfig, base: str = "base") -> Make:
    return lambda path: get_peft_model(AutoModelForCausalLM.from_pretrained(FIXTURES / base), config).save_pretrained(
        path
    )


def _reward(config: PeftConfig, labels: int = 1) -> Make:
    def make(path: Path) -> None:
        model = AutoModelForSequenceClassification.from_pretrained(FIXTURES / "base", num_labels=labels)
        get_peft_model(model, config).save_pretrained(path)

    return make


def _lora(**settings: object) -> LoraConfig:
    return LoraConfig(**{"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **settings})


def _of_a_narrower_base(path: Path) -> None:
    settings = LlamaConfig(**{**LLAMA.to_dict(), "hidden_size": 16, "head_dim": 4})
    get_peft_model(LlamaForCausalLM(settings), _lora()).save_pretrained(path)


def _saved_as_pickle(path: Path) -> None:
    _policy(_lora())(path)
    (path / "adapter_model.safetensors").unlink()
    # If this is ever opened as torch.load would open it, it leaves a mark.
    (path / "adapter_model.bin").write_bytes(pickle.dumps(Mark(path / "opened")))


class Mark:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def _with(make: Make, change: Callable[[dict[str, torch.Tensor]], None]) -> Make:
    def made(path: Path) -> None:
        make(path)
        tensors = load_file(path / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})

    return made


def _first_is_nan(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = torch.nan


def _last_is_gone(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[max(tensors)]


def _bias_is_too_long(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.score.bias"] = torch.zeros(2)


def _config_is_broken(path: Path) -> None:
    _policy(_lora())(path)
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", ')


def _no_weights(path: Path) -> None:
    _policy(_lora())(path)
    (path / "adapter_model.safetensors").unlink()


SEQ_CLS = {"task_type": "SEQ_CLS"}
Case = tuple[Make, AdapterKind, type[OnebaseError], str, tuple[str, ...]]

REFUSED: dict[str, Case] = {
    "another hidden size": (
        _of_a_narrower_base,
        "policy",
        FailedPreconditionError,
        "WRONG_BASE",
        ("(2, 16)", "(2, 32)", "another base"),
    ),
    "another architecture": (
        _policy(_lora(target_modules=["c_attn"], fan_in_fan_out=True), "base_gpt2"),
        "policy",
        FailedPreconditionError,
        "TARGET_MODULES_NOT_FOUND",
        ("c_attn", "LlamaForCausalLM"),
    ),
    "no task_type, so no head": (
        _reward(_lora(task_type=None)),
        "reward",
        FailedPreconditionError,
        "MISSING_SCORE_HEAD",
        ("score head", "SEQ_CLS", "task_type"),
    ),
    "a policy as a reward": (
        _policy(_lora()),
        "reward",
        FailedPreconditionError,
        "WRONG_TASK_TYPE",
        ("CAUSAL_LM", "SEQ_CLS"),
    ),
    "a reward as a policy": (
        _reward(_lora(**SEQ_CLS)),
        "policy",
        FailedPreconditionError,
        "WRONG_TASK_TYPE",
        ("SEQ_CLS", "reward"),
    ),
    "two labels as a critic": (
        _reward(_lora(**SEQ_CLS), labels=2),
        "critic",
        FailedPreconditionError,
        "SEVERAL_LABELS",
        ("2 labels", "one label"),
    ),
    "a score head with a bias of another shape": (
        _with(_reward(_lora(**SEQ_CLS)), _bias_is_too_long),
        "reward",
        FailedPreconditionError,
        "WRONG_BASE",
        ("score.bias", "(2,)", "(1,)"),
    ),
    "a pickle": (
        _saved_as_pickle,
        "policy",
        InvalidArgumentError,
        "PICKLE_ADAPTER",
        ("adapter_model.bin", "safe_serialization"),
    ),
    "DoRA": (
        _policy(_lora(use_dora=True)),
        "policy",
        FailedPreconditionError,
        "SETTING_NOT_SUPPORTED",
        ("use_dora=True", "use_dora=False"),
    ),
    "biases": (
        _policy(_lora(bias="lora_only")),
        "policy",
        FailedPreconditionError,
        "SETTING_NOT_SUPPORTED",
        ("bias='lora_only'", "bias='none'"),
    ),
    "LoRA's own biases": (
        _policy(_lora(lora_bias=True)),
        "policy",
        FailedPreconditionError,
        "SETTING_NOT_SUPPORTED",
        ("lora_bias",),
    ),
    "an embedding saved with it": (
        _policy(_lora(modules_to_save=["embed_tokens"])),
        "policy",
        FailedPreconditionError,
        "SETTING_NOT_SUPPORTED",
        ("modules_to_save", "embed_tokens"),
    ),
    "LoRA of the output layer": (
        _policy(_lora(target_modules=["q_proj", "lm_head"])),
        "policy",
        FailedPreconditionError,
        "TARGET_MODULE_NOT_SUPPORTED",
        ("lm_head", "target_modules"),
    ),
    "LoRA of the embedding": (
        _policy(_lora(target_modules=["q_proj", "embed_tokens"])),
        "policy",
        FailedPreconditionError,
        "TARGET_MODULE_NOT_SUPPORTED",
        ("embed_tokens", "target_modules"),
    ),
    "prompt tuning": (
        _policy(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        "policy",
        FailedPreconditionError,
        "NOT_LORA",
        ("PROMPT_TUNING", "LORA"),
    ),
    "NaN": (
        _with(_policy(_lora()), _first_is_nan),
        "policy",
        InvalidArgumentError,
        "NONFINITE_TENSOR",
        ("lora_A", "NaN"),
    ),
    "a missing tensor": (
        _with(_policy(_lora()), _last_is_gone),
        "policy",
        FailedPreconditionError,
        "MISSING_TENSOR",
        ("model.layers.1.self_attn.q_proj.lora_B",),
    ),
    "a broken adapter_config.json": (
        _config_is_broken,
        "policy",
        InvalidArgumentError,
        "BAD_JSON",
        ("adapter_config.json",),
    ),
    "no adapter_config.json": (
        lambda path: None,
        "policy",
        NotFoundError,
        "CONFIG_NOT_FOUND",
        ("adapter_config.json",),
    ),
    "no weights": (_no_weights, "policy", NotFoundError, "WEIGHTS_NOT_FOUND", ("adapter_model.safetensors",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_cannot_be_served_right_is_refused(client: Client, place: Path, case: str) -> None:
    make, kind, error, reason, words = REFUSED[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT itself wonders about some of these
        make(place)
    before = client.adapters()
    with pytest.raises(error) as refused:
        client.load_adapter("refused", str(place), kind=kind)
    assert type(refused.value) is error
    assert (refused.value.reason, refused.value.field) == (reason, "path")
    for word in words:
        assert word in str(refused.value)
    assert not (place / "opened").exists()
    assert client.adapters() == before


def test_a_checkpoint_that_was_changed_is_refused(client: Client, place: Path) -> None:
    path = Path(client.save_adapter("policy", str(place / "saved")).path)
    _with(lambda path: None, lambda tensors: next(iter(tensors.values())).add_(1.0))(path)
    with pytest.raises(DataLossError) as refused:
        client.load_adapter("refused", str(path), kind="policy")
    assert refused.value.reason == "HASH_MISMATCH"
    assert "adapter_model.safetensors" in str(refused.value)


def test_a_checkpoint_of_another_base_is_refused_even_where_shapes_fit(client: Client, place: Path) -> None:
    path = Path(client.save_adapter("policy", str(place / "saved")).path)
    manifest = json.loads((path / "onebase.json").read_text())
    manifest["base"] |= {"model": "another-model", "fingerprint": "0" * 64}
    (path / "onebase.json").write_text(json.dumps(manifest))
    with pytest.raises(FailedPreconditionError) as refused:
        client.load_adapter("refused", str(path), kind="policy")
    assert (refused.value.reason, refused.value.field) == ("WRONG_BASE", "path")
    assert "another-model" in str(refused.value)


def test_a_path_outside_the_roots_is_refused(client: Client) -> None:
    for path in (str(FIXTURES / "policy"), "../policy"):
        with pytest.raises(PermissionDeniedError) as refused:
            client.load_adapter("refused", path, kind="policy")
        assert (refused.value.reason, refused.value.field) == ("PATH_OUTSIDE_ROOTS", "path")
        assert "root" in str(refused.value)


ONE = Sequence([5, 6], [7, 8])
LONG = [5] * 100


@pytest.mark.parametrize(
    ("call", "error", "field", "words"),
    [
        (lambda c: c.reward([ONE], "rewrad"), NotFoundError, "rewards[0].adapter", ("rewrad", "reward")),
        (lambda c: c.logprob([ONE], adapter="policy_al"), NotFoundError, "adapter", ("policy_al", "policy_all")),
        (lambda c: c.reference_logprob([ONE], reference="nobody"), NotFoundError, "reference", ("nobody",)),
        (lambda c: c.generate([[5]], adapter="nobody"), NotFoundError, "adapter", ("nobody",)),
        (lambda c: c.reward([ONE], "policy"), FailedPreconditionError, "rewards[0].adapter", ("policy", "reward")),
        (lambda c: c.reference_logprob([ONE], reference="policy"), FailedPreconditionError, "reference", ("policy",)),
        (
            lambda c: c.logprob([ONE, Sequence([5], [120])], adapter="policy"),
            InvalidArgumentError,
            "sequences[1].completion",
            ("120",),
        ),
        (lambda c: c.reward([Sequence([-1], [5])], "reward"), InvalidArgumentError, "sequences[0].prompt", ("-1",)),
        (
            lambda c: c.logprob([Sequence([5], np.array([], dtype=np.int32))], adapter="policy"),
            InvalidArgumentError,
            "sequences[0].completion",
            ("token",),
        ),
        (
            lambda c: c.logprob([Sequence(np.array([], dtype=np.int32), [5])], adapter="policy"),
            InvalidArgumentError,
            "sequences[0].prompt",
            ("token",),
        ),
        (
            lambda c: c.logprob([Sequence(LONG, LONG)], adapter="policy"),
            InvalidArgumentError,
            "sequences[0]",
            ("200", "128"),
        ),
        (
            lambda c: c.generate([LONG], adapter="policy", sampling=SamplingParams(max_new_tokens=29)),
            InvalidArgumentError,
            "sampling.max_new_tokens",
            ("prompts[0]", "100", "29", "128"),
        ),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(
    client: Client, call: Callable[[Client], object], error: type[OnebaseError], field: str, words: tuple[str, ...]
) -> None:
    with pytest.raises(error) as refused:
        call(client)
    assert type(refused.value) is error
    assert refused.value.reason
    assert refused.value.field.startswith(field)
    for word in words:
        assert word in str(refused.value)
