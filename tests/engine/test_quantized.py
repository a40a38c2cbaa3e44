"""Quantized bases: what bitsandbytes stores, and the same numbers for every row, mode and batch."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from engine.conftest import BASE, POLICIES, Run, generation, perturb, texts
from engine.test_mixed import ADAPTERS, row, train_rows
from oracle.fixtures import PEFT_WARNINGS
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from onebase.server.config import EngineConfig
from onebase.server.engine import Engine, open_engine, quantized
from onebase.server.engine.quantized import Int8Linear, Nf4Linear, QuantizedLinear
from onebase.server.errors import FailedPrecondition
from onebase.server.jobs import (
    AdamW,
    AdapterKind,
    CreateAdapterJob,
    ForwardBackwardJob,
    LoadAdapterJob,
    LoraSpec,
    OptimStepJob,
    PpoLoss,
    ScoreJob,
    TrainRow,
)
from onebase.server.worker import Worker

GPT2 = BASE.parent / "base_gpt2"
KINDS = ("int8", "nf4")
MAPS = Path("/proc/self/maps")
STEP = {"int8": 1.02 / 127, "nf4": 0.305}
"""The widest gap between two numbers that a kind can tell apart, relative to the largest."""
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def opened(kind: str, dtype: str = "float32", base: Path = BASE) -> Engine:
    return open_engine(EngineConfig(model=str(base), threads=1, kv_slots=8, quantization=kind, dtype=dtype))


@pytest.fixture(params=[*((kind, dtype) for kind in KINDS for dtype in ("float32", "bfloat16"))], ids="-".join)
def engine(request: pytest.FixtureRequest) -> Engine:
    """An engine on each kind of quantized base: conftest's worker runs on it."""
    return opened(*request.param)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose rows are multiples of nf4's blocks: bitsandbytes' own CPU kernel is right on no other."""
    path = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=100, max_position_embeddings=64, initializer_range=0.1, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((BASE / name).read_bytes())
    return path


@pytest.fixture(params=KINDS)
def fp32(request: pytest.FixtureRequest, wide: Path) -> Engine:
    """An engine on a quantized base with products in float32, and one policy that differs from the base."""
    engine = opened(request.param, base=wide)
    engine.add(engine.formats.create(CreateAdapterJob(uid=1, name="p", lora=LoraSpec(4, 8.0), value_head=True)))
    perturb(engine, 1)
    return engine


def by_table(codes: torch.Tensor, scales: torch.Tensor, out: int, size: int) -> torch.Tensor:
    """NF4 written out: two codes in a byte, the first in its upper half; 64 neighbours share a scale."""
    table = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    levels = table[torch.stack([codes >> 4, codes & 15], dim=-1).long().view(-1)][: out * size]
    return (levels * scales.repeat_interleave(64)[: out * size]).view(out, size)


def layer(kind: str, weight: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[QuantizedLinear, torch.Tensor]:
    """A layer as it is taken over from bitsandbytes, and its dequantized weight in float32, as bitsandbytes has it."""
    out, size = weight.shape
    if kind == "int8":
        theirs: Any = bitsandbytes.nn.Linear8bitLt(size, out, bias is not None, has_fp16_weights=False)
        theirs.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False).to("cpu")
        dequantized = theirs.weight.data.float() * theirs.weight.SCB[:, None] / 127
    else:
        theirs = bitsandbytes.nn.Linear4bit(size, out, bias is not None, quant_type="nf4")
        params = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False)
        theirs.weight = params.to("cpu")
        dequantized = by_table(theirs.weight.data.view(-1), theirs.weight.quant_state.absmax, out, size)
    if bias is not None:
        theirs.bias = nn.Parameter(bias)
    holder = nn.Sequential(theirs)
    quantized.take_over(holder)
    assert isinstance(holder[0], QuantizedLinear)
    return holder[0], dequantized


def assert_close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    worst = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
    assert worst <= CLOSE[dtype], f"differs by {worst:.1e}"


# -------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("size", [24, 64, 96], ids="in-{}".format)
@pytest.mark.parametrize("block", [2**20, 1], ids=["one-block", "three-blocks"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_multiplies_by_its_dequantized_weight(
    kind: str, block: int, size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "BLOCK", block)  # the second cuts 300 rows into 128, 128 and 44
    random = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(300, size, generator=random), torch.randn(300, generator=random)
    ours, dequantized = layer(kind, weight.to(dtype), bias.to(dtype))
    error = (dequantized - weight.to(dtype).float()).abs().max() / weight.abs().max()
    assert 1e-3 < error < STEP[kind] / 2
    x = torch.randn(1, 9, size, generator=random).to(dtype).requires_grad_()
    y = ours(x)
    assert y.dtype == dtype
    assert_close(y, x.float() @ dequantized.t() + bias, dtype)
    upstream = torch.randn(y.shape, generator=random).to(dtype)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    assert gradient.dtype == dtype
    assert_close(gradient, upstream.float() @ dequantized, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_in_any_batch_and_with_gradients(kind: str, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    ours, _ = layer(kind, torch.randn(96, 64, generator=random).to(dtype))
    x = torch.randn(40, 64, generator=random).to(dtype)
    x[30, 5] = 50.0  # LLM.int8() takes this column out of every row's product
    y = ours(x)
    for start in range(0, 40, 4):
        assert torch.equal(ours(x[start : start + 4]), y[start : start + 4])
    assert torch.equal(ours(x.clone().requires_grad_()), y)


@pytest.mark.parametrize("kind", KINDS)
def test_training_keeps_no_widened_weight(kind: str) -> None:
    ours, _ = layer(kind, torch.randn(96, 64))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ours(torch.randn(8, 64, requires_grad=True)).sum().backward()
    assert kept == []


def test_products_of_int8_fit_into_float16() -> None:
    ours, _ = layer("int8", torch.full((4, 64), 1e-3, dtype=torch.float16))
    y = ours(torch.full((4, 64), 300.0, dtype=torch.float16))  # codes alone would give 2.4e6
    assert_close(y, torch.full((4, 4), 19.2), torch.float16)


def test_a_model_that_looks_at_a_weight_fails_instead_of_reading_codes() -> None:
    with pytest.raises(AttributeError, match="weight"):
        _ = layer("int8", torch.randn(8, 8))[0].weight


# ------------------------------------------------------------------------------------------------------- the base


@pytest.mark.parametrize("base", [BASE, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize(("kind", "type_of"), [("int8", Int8Linear), ("nf4", Nf4Linear)])
def test_facts_say_what_is_kept(kind: str, type_of: type[QuantizedLinear], base: Path) -> None:
    plain, engine = opened("none", base=base), opened(kind, base=base)
    facts = engine.facts
    assert (facts.quantization, facts.dtype) == (kind, "float32")
    assert (facts.fingerprint, facts.parameter_count) == (plain.facts.fingerprint, plain.facts.parameter_count)
    linears = [module for module in engine._model.modules() if isinstance(module, QuantizedLinear)]
    assert len(linears) == 2 * (7 if base == BASE else 4)
    assert all(type(module) is type_of for module in linears)
    numbers = sum(module.in_features * module.out_features for module in linears)
    scales = numbers // 64 if kind == "nf4" else sum(module.out_features for module in linears)
    kept = (numbers // 2 if kind == "nf4" else numbers) + 4 * scales
    assert facts.weights_bytes == 4 * (facts.parameter_count - numbers) + kept
    for outside in (engine._model.get_input_embeddings(), engine._model.get_output_embeddings()):
        assert outside.weight.dtype == torch.float32


@pytest.mark.skipif(not MAPS.exists(), reason="this system does not tell which files are mapped")
@pytest.mark.parametrize("kind", KINDS)
def test_the_file_of_the_plain_weights_does_not_stay_in_memory(kind: str, tmp_path: Path) -> None:
    for file in BASE.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    engine = opened(kind, base=tmp_path)
    assert str(tmp_path) not in MAPS.read_text()
    assert engine.facts.quantization == kind


def test_the_fingerprint_tells_bases_apart_by_quantized_weights_alone(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1.0
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((BASE / name).read_bytes())
    other = opened("nf4", base=tmp_path).facts.fingerprint
    assert other == opened("none", base=tmp_path).facts.fingerprint
    assert other != opened("nf4").facts.fingerprint


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_a_model_that_was_saved_quantized_is_refused(kind: str, tmp_path: Path) -> None:
    config = json.loads((BASE / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    for file in BASE.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FailedPrecondition, match="saved with quantized weights"):
        opened(kind, base=tmp_path)


def test_without_bitsandbytes_the_flag_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FailedPrecondition, match="pip install bitsandbytes"):
        quantized.loading_config("nf4")
    assert quantized.loading_config("none") is None


# ------------------------------------------------------------------------------------------------- against PEFT


@pytest.fixture
def peft(fp32: Engine, wide: Path, tmp_path: Path) -> PeftModel:
    """PEFT's model with the engine's policy, on the base that transformers quantizes in the same way."""
    fp32.formats.save(fp32.adapters[1], tmp_path / "p", with_optimizer=False, overwrite=False)
    base = AutoModelForCausalLM.from_pretrained(
        wide, quantization_config=quantized.loading_config(fp32.facts.quantization), device_map={"": "cpu"}
    )
    # In training mode, without dropout: in evaluation bitsandbytes rounds activations to int8, or products to bfloat16.
    return PeftModel.from_pretrained(base, tmp_path / "p", is_trainable=True).train()


@pytest.fixture
def fp32_run(fp32: Engine) -> Iterator[Run]:
    """Runs jobs on the float32 engine."""
    from onebase.server.config import Budget, Limits

    worker = Worker(fp32, Limits(), Budget(256, 256))
    worker.start()

    def run(job: Any) -> Any:
        worker.submit(job)
        return job.done.result(60)

    yield run
    worker.stop(0.0)


def peft_logprobs(model: PeftModel, tokens: np.ndarray, start: int) -> torch.Tensor:
    ids = torch.from_numpy(tokens)[None]
    logprobs = torch.log_softmax(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float(), dim=-1)
    return logprobs[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0]


@PEFT_WARNINGS
def test_logprobs_are_pefts(peft: PeftModel, fp32_run: Run) -> None:
    sequences = texts(6)
    scored = fp32_run(ScoreJob(rows=[row(1, tokens) for tokens in sequences]))
    for tokens, found in zip(sequences, scored.rows, strict=True):
        wanted = peft_logprobs(peft, tokens, 3).detach()
        assert_close(torch.from_numpy(found.logprobs), wanted, torch.float32)


@PEFT_WARNINGS
def test_gradients_are_pefts(peft: PeftModel, fp32: Engine, fp32_run: Run) -> None:
    old = fp32_run(ScoreJob(rows=[row(1, r.tokens) for r in train_rows(1)])).rows
    rows = [
        TrainRow(r.tokens, r.start, o.logprobs, r.old_values, r.advantages, r.returns, r.mask)
        for r, o in zip(train_rows(1), old, strict=True)
    ]
    fp32_run(ForwardBackwardJob(adapter=1, rows=rows, loss=PpoLoss(vf_coef=0.0)))
    loss = torch.zeros(())
    for r in rows:
        now = peft_logprobs(peft, r.tokens, r.start)
        loss = loss - (torch.from_numpy(r.advantages) * (now - now.detach()).exp()).sum()
    (loss / sum(len(r.advantages) for r in rows)).backward()
    wanted = {name: p.grad for name, p in peft.named_parameters() if p.grad is not None}
    found = {name: g for name, g in fp32.adapters[1].gradients.items() if "lora_" in name}
    assert len(found) == len(wanted) == 28
    for name, gradient in found.items():
        assert gradient.abs().max() > 0, name
        assert_close(gradient, wanted[f"base_model.model.{name.replace('.weight', '.default.weight')}"], torch.float32)


# ------------------------------------------------------------------------------------------------------ the engine


def test_rows_of_a_mixed_batch_are_those_of_each_alone(run: Run) -> None:
    sequences = texts(8)
    mixed = run(ScoreJob(rows=[row(ADAPTERS[i % 4], t) for i, t in enumerate(sequences)]))
    for i, tokens in enumerate(sequences):
        alone = run(ScoreJob(rows=[row(ADAPTERS[i % 4], tokens)])).rows[0]
        np.testing.assert_array_equal(mixed.rows[i].logprobs, alone.logprobs)


def test_generated_logprobs_and_values_equal_the_scored_ones(run: Run) -> None:
    prompts = [t[:k] for k, t in enumerate(texts(4), start=2)]
    job, chunks = generation(2, prompts, n=2, values=True, seed=5, ignore_eos=True)
    run(job)
    for (prompt, _), [chunk] in chunks.items():
        tokens = np.concatenate([prompts[prompt], chunk.tokens])
        scored = run(ScoreJob(rows=[row(2, tokens, len(prompts[prompt]))])).rows[0]
        np.testing.assert_array_equal(np.float32(chunk.logprobs), scored.logprobs)
        np.testing.assert_array_equal(np.float32(chunk.values), scored.values)


def test_training_starts_from_the_scored_logprobs_and_gradients_do_not_mix(
    worker: Worker, engine: Engine, run: Run
) -> None:
    jobs = [ForwardBackwardJob(adapter=uid, rows=train_rows(uid), loss=PpoLoss()) for uid in POLICIES]
    for job in jobs:
        worker.submit(job)
    passes = [job.done.result(60) for job in jobs]
    shared = {uid: {k: g.clone() for k, g in engine.adapters[uid].gradients.items()} for uid in POLICIES}
    for uid, passed in zip(POLICIES, passes, strict=True):
        scored = run(ScoreJob(rows=[row(uid, r.tokens) for r in train_rows(uid)]))
        for trained, found in zip(passed.logprobs, scored.rows, strict=True):
            np.testing.assert_array_equal(trained, found.logprobs)
        engine.adapters[uid].drop_gradients()
        run(ForwardBackwardJob(adapter=uid, rows=train_rows(uid), loss=PpoLoss()))
        for name, gradient in engine.adapters[uid].gradients.items():
            assert torch.equal(gradient, shared[uid][name]), name


def test_steps_make_rewarded_tokens_likelier_and_leave_the_base_as_it_is(engine: Engine, run: Run) -> None:
    rows = [
        TrainRow(r.tokens, r.start, r.old_logprobs, r.old_values, np.ones_like(r.advantages), r.returns, r.mask)
        for r in train_rows(1)
    ]
    codes = {name: p.clone() for name, p in engine._model.named_parameters() if "codes" in name or "scales" in name}
    means = []
    for _ in range(5):
        passed = run(ForwardBackwardJob(adapter=1, rows=rows, loss=PpoLoss(cliprange=1e3, ratio_threshold=1e9)))
        means.append(float(np.concatenate(passed.logprobs).mean()))
        run(OptimStepJob(adapter=1, adamw=AdamW(5e-3), max_grad_norm=1.0))
    assert all(later > before for before, later in itertools.pairwise(means)), means
    assert means[-1] > means[0] + 0.05
    assert len(codes) == 2 * 14
    assert all(torch.equal(p, codes[name]) for name, p in engine._model.named_parameters() if name in codes)
    assert all(p.dtype == torch.float32 for p in engine.adapters[1].weights.parameters().values())


# ------------------------------------------------------------------------------------------------ adapters' files


def saved(engine: Engine, path: Path) -> Path:
    engine.add(engine.formats.create(CreateAdapterJob(uid=9, name="p", lora=LoraSpec(2, 4.0), value_head=False)))
    engine.formats.save(engine.adapters[9], path, with_optimizer=False, overwrite=False)
    return path


def loaded(engine: Engine, path: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings of a load."""
    caplog.clear()
    job = LoadAdapterJob(uid=3, name="policy_3", kind=AdapterKind.POLICY, path=path)
    with caplog.at_level(logging.INFO, logger="onebase"):
        engine.formats.load(job, max_rank=64)
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (("none", "bfloat16"), ("int8", "bfloat16")),
        (("nf4", "float32"), ("none", "float32")),
        (("none", "float32"), ("none", "bfloat16")),
    ],
)
def test_an_adapter_of_another_precision_is_loaded_with_a_warning(
    there: tuple[str, str], here: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, engine = saved(opened(*there), tmp_path / "p"), opened(*here)
    (message,) = loaded(engine, path, caplog)
    names = [dtype if kind == "none" else f"{kind} with {dtype} products" for kind, dtype in (there, here)]
    assert f"'policy_3' was trained on the base in {names[0]!r}, and this server has it in {names[1]}" in message
    assert "may not converge" in message


def test_the_same_precision_or_none_told_is_no_matter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, engine = saved(opened("int8"), tmp_path / "p"), opened("int8")
    assert loaded(engine, path, caplog) == []
    manifest = json.loads((path / "onebase.json").read_text())
    assert (manifest["base"]["dtype"], manifest["base"]["quantization"]) == ("float32", "int8")
    (path / "onebase.json").unlink()  # as PEFT leaves it
    assert loaded(engine, path, caplog) == []


def test_a_manifest_that_does_not_speak_of_quantization_means_a_plain_base(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(opened("none"), tmp_path / "p")
    manifest = json.loads((path / "onebase.json").read_text())
    del manifest["base"]["quantization"]
    (path / "onebase.json").write_text(json.dumps(manifest))
    assert loaded(opened("none"), path, caplog) == []
    assert len(loaded(opened("nf4"), path, caplog)) == 1


@pytest.mark.parametrize(("base", "conv1d"), [(BASE, False), (GPT2, True)], ids=["llama", "gpt2"])
def test_an_adapter_of_a_quantized_base_is_one_of_the_plain_base(base: Path, conv1d: bool, tmp_path: Path) -> None:
    path = saved(opened("int8", base=base), tmp_path / "p")
    assert json.loads((path / "adapter_config.json").read_text())["fan_in_fan_out"] is conv1d
    job = LoadAdapterJob(uid=3, name="p", kind=AdapterKind.POLICY, path=path)
    weights = opened("none", base=base).formats.load(job, max_rank=64).weights.parameters()
    stored = load_file(path / "adapter_model.safetensors")
    assert {name: tuple(p.shape) for name, p in weights.items()} == {
        name.removeprefix("base_model.model."): tuple(p.shape) for name, p in stored.items()
    }
