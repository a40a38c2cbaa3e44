"""Files are read and written beside the worker's thread: no step waits for them, and what is written is one version."""

from __future__ import annotations

import json
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.conftest import Run, generation, texts
from engine.test_mixed import row, train_rows
from safetensors.torch import load_file, save_file

from onebase.server.engine import Engine
from onebase.server.engine.files import SavedFiles, write_directory
from onebase.server.engine.tensors import StoredTensors
from onebase.server.errors import AlreadyExists, FailedPrecondition, InvalidArgument, Unavailable
from onebase.server.jobs import (
    AdamW,
    AdapterKind,
    CompletionChunk,
    CreateAdapterJob,
    DeleteAdapterJob,
    DescribeAdaptersJob,
    ForwardBackwardJob,
    LoadAdapterJob,
    LoraSpec,
    OptimStepJob,
    PpoLoss,
    SaveAdapterJob,
    ScoreJob,
)
from onebase.server.worker import Worker


class Held:
    """Stops a method of the engine's formats in the middle of a job until it is let go."""

    def __init__(self, engine: Engine, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inside, self.go = threading.Event(), threading.Event()
        original = getattr(engine.formats, method)

        def held(*arguments: Any, **keywords: Any) -> Any:
            self.inside.set()
            assert self.go.wait(30)
            return original(*arguments, **keywords)

        monkeypatch.setattr(engine.formats, method, held)


def step(run: Run, uid: int) -> None:
    run(ForwardBackwardJob(adapter=uid, rows=train_rows(uid), loss=PpoLoss()))
    run(OptimStepJob(adapter=uid, adamw=AdamW(0.1)))


def test_a_policy_is_stepped_while_it_is_written_and_the_files_are_of_the_version_before(
    worker: Worker, engine: Engine, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step(run, 1)
    adapter = engine.adapters[1]
    before = {name: tensor.detach().clone() for name, tensor in adapter.weights.parameters().items()}
    assert adapter.moments is not None
    moments = {name: tensor.clone() for name, tensor in adapter.moments.exp_avg.items()}
    held = Held(engine, "save", monkeypatch)
    job = SaveAdapterJob(adapter=1, path=tmp_path / "saved", with_optimizer=True)
    worker.submit(job)
    assert held.inside.wait(30)
    step(run, 1)
    assert not job.done.done()
    held.go.set()
    assert job.done.result(30).version == 1
    written = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    for name, tensor in written.items():
        assert torch.equal(tensor, before[name.removeprefix("base_model.model.")]), name
    kept = load_file(tmp_path / "saved" / "optimizer.safetensors")
    assert int(kept["step"]) == 1
    assert all(torch.equal(kept[f"exp_avg.{name}"], tensor) for name, tensor in moments.items())
    assert adapter.weights.version == 2
    described = run(DescribeAdaptersJob())[1]
    assert described.memory.old_versions == 0  # what was read was given back


def test_completions_under_way_go_on_with_the_version_that_was_replaced(
    worker: Worker, run: Run, tmp_path: Path
) -> None:
    """A replacement is a load under a new uid, and then the end of the old one."""
    run(SaveAdapterJob(adapter=2, path=tmp_path / "other"))
    prompt = texts(1)[0][:4]
    alone, wanted = generation(1, [prompt], seed=1, max_new_tokens=60, ignore_eos=True)
    run(alone)
    begun, replaced = threading.Event(), threading.Event()
    job, chunks = generation(1, [prompt], seed=1, max_new_tokens=60, ignore_eos=True, stream_tokens=True)
    emit = job.emit

    def emit_and_tell(chunk: CompletionChunk) -> None:
        emit(chunk)
        begun.set()
        if not replaced.is_set():
            replaced.wait(0.02)  # slow enough for what follows to come in the middle

    job.emit = emit_and_tell
    worker.submit(job)
    assert begun.wait(30)
    run(LoadAdapterJob(uid=9, name="new", kind=AdapterKind.POLICY, path=tmp_path / "other", least_version=1))
    run(DeleteAdapterJob(adapter=1))
    assert not job.done.done(), "the replacement came too late to show anything"
    replaced.set()
    job.done.result(30)
    assert [token for chunk in chunks[0, 0] for token in chunk.tokens] == list(wanted[0, 0][0].tokens)
    assert {chunk.version for chunk in chunks[0, 0]} == {0}
    assert run(ScoreJob(rows=[row(9, texts(1)[0])])).versions == {9: 1}


def test_no_step_waits_for_an_adapter_that_is_read(
    worker: Worker, engine: Engine, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(SaveAdapterJob(adapter=1, path=tmp_path / "saved"))
    held = Held(engine, "load", monkeypatch)
    job = LoadAdapterJob(uid=9, name="nine", kind=AdapterKind.POLICY, path=tmp_path / "saved")
    worker.submit(job)
    assert held.inside.wait(30)
    assert run(ScoreJob(rows=[row(1, texts(1)[0])])).rows[0].logprobs is not None
    step(run, 2)
    assert 9 not in engine.adapters
    held.go.set()
    assert job.done.result(30).uid == 9
    scores = [run(ScoreJob(rows=[row(uid, texts(1)[0])])).rows[0].logprobs for uid in (1, 9)]
    assert (scores[0] == scores[1]).all()


def test_a_read_that_fails_fails_its_job_alone(engine: Engine, run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(Exception, match="adapter_config") as refused:
        run(LoadAdapterJob(uid=9, name="nine", kind=AdapterKind.POLICY, path=tmp_path / "empty"))
    assert refused.value.reason == "CONFIG_NOT_FOUND"  # type: ignore[attr-defined]
    assert 9 not in engine.adapters
    step(run, 1)


def test_a_drain_waits_for_what_is_written_and_ends_what_has_not_begun(
    worker: Worker, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(engine, "save", monkeypatch)
    jobs = [SaveAdapterJob(adapter=1, path=tmp_path / str(i)) for i in range(6)]  # more than there are threads
    for job in jobs:
        worker.submit(job)
    assert held.inside.wait(30)
    stopping = threading.Thread(target=worker.stop, args=(0.05,))
    stopping.start()
    until = threading.Event()
    until.wait(0.3)
    held.go.set()
    stopping.join(30)
    assert not stopping.is_alive()
    outcomes = [job.done.exception(1) for job in jobs]
    assert [type(error) for error in outcomes] == [type(None)] * 3 + [Unavailable] * 3  # a thread stays free for steps
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "2"}


def test_adapters_made_and_read_at_once_are_what_each_is_alone(
    worker: Worker, engine: Engine, run: Run, tmp_path: Path
) -> None:
    """PEFT changes how torch makes parameters while it places an adapter, for all threads."""
    run(SaveAdapterJob(adapter=1, path=tmp_path / "saved"))
    jobs: list[Any] = []
    for uid in range(10, 30, 2):
        jobs.append(CreateAdapterJob(uid=uid, name=f"p{uid}", lora=LoraSpec(2), value_head=True, seed=1))
        jobs.append(LoadAdapterJob(uid=uid + 1, name=f"p{uid + 1}", kind=AdapterKind.POLICY, path=tmp_path / "saved"))
    for job in jobs:
        worker.submit(job)
    for job in jobs:
        job.done.result(60)
    for uid in range(10, 30):
        like = engine.adapters[10 + uid % 2].weights.parameters()
        found = engine.adapters[uid].weights.parameters()
        assert all(torch.equal(found[name], tensor) for name, tensor in like.items())
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"


@pytest.fixture(params=["exchanged", "in two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a directory takes the place of another; in two renames where the system cannot exchange them."""
    if request.param != "exchanged":
        monkeypatch.setattr("onebase.server.directories._renameat2", None)
    return str(request.param)


@pytest.mark.usefixtures("way")
def test_several_writes_to_one_path_leave_one_whole_directory(tmp_path: Path) -> None:
    def write(number: int) -> object:
        def fill(folder: Path) -> None:
            (folder / "adapter_config.json").write_text(str(number))

        try:
            return write_directory(tmp_path / "one", fill, {"version": number}, overwrite=number > 0)
        except AlreadyExists:
            return None

    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(write, range(40)))
    assert all(written[1:])
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    manifest = SavedFiles(tmp_path / "one").manifest()
    assert (tmp_path / "one" / "adapter_config.json").read_text() == str(manifest["version"])


def test_what_is_overwritten_is_there_until_the_new_one_is(tmp_path: Path, way: str) -> None:
    """Looked at between any two calls that an overwrite makes: a kill can come at each."""
    path, seen = tmp_path / "one", list[str]()

    def write(text: str, *, overwrite: bool) -> None:
        write_directory(path, lambda folder: (folder / "adapter_config.json").write_text(text), {}, overwrite=overwrite)

    def look(*_: object) -> None:
        try:
            seen.append((path / "adapter_config.json").read_text())
        except FileNotFoundError:
            seen.append("nothing")

    write("old", overwrite=False)
    sys.setprofile(look)
    try:
        write("new", overwrite=True)
    finally:
        sys.setprofile(None)
    assert list(dict.fromkeys(seen)) == (["old", "new"] if way == "exchanged" else ["old", "nothing", "new"])
    assert [one.name for one in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize(
    "text",
    [
        '{"version": "1"}',
        '{"version": -1}',
        '{"version": 1e300}',
        '{"base": []}',
        '{"base": {"fingerprint": 5}}',
        '{"sha256": 3}',
        "[]",
        "{",
    ],
)
def test_a_manifest_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "onebase.json").write_text(text)
    with pytest.raises(InvalidArgument) as refused:
        SavedFiles(tmp_path).manifest()
    assert refused.value.field == "path"
    assert "onebase.json" in refused.value.message


@pytest.mark.parametrize("dtype", [torch.uint8, torch.complex64, torch.float8_e4m3fn, torch.bool])
def test_tensors_of_another_dtype_are_refused_in_words(run: Run, tmp_path: Path, dtype: torch.dtype) -> None:
    run(SaveAdapterJob(adapter=1, path=tmp_path / "saved"))
    path = tmp_path / "saved" / "adapter_model.safetensors"
    (tmp_path / "saved" / "onebase.json").unlink()  # as PEFT writes it: without hashes
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(InvalidArgument, match=str(dtype).removeprefix("torch.")) as refused:
        run(LoadAdapterJob(uid=9, name="nine", kind=AdapterKind.POLICY, path=tmp_path / "saved"))
    assert refused.value.reason == "BAD_DTYPE"


@pytest.mark.parametrize(
    "change",
    [
        {"r": "8"},
        {"r": None},
        {"r": 2.5},
        {"r": True},
        {"lora_alpha": "x"},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": {"q_proj": "2"}},
        {"alpha_pattern": {"q_proj": None}},
        {"target_modules": 3},
        {"target_modules": [3]},
        {"target_modules": "("},
        {"modules_to_save": 5},
        {"layers_to_transform": "x"},
        {"task_type": 5},
        {"init_lora_weights": {}},
        {"exclude_modules": 5},
        {"layers_pattern": 5},
        {"layers_to_transform": ["1"]},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"q_proj": -4}},
        {"lora_alpha": float("nan")},
        {"lora_alpha": 10**400},
        {"alpha_pattern": {"q_proj": 10**400}},
        {"rank_pattern": {"q_proj": 10**400}},
        {"r": 10**400},
        {"lora_dropout": 10**400},
        {"layers_to_transform": [10**400]},
        {"peft_type": "X" * 2**20},
        {"task_type": "X" * 2**20},
        {"X" * 2**20: 1},
        {"target_modules": [f"z{i}{'y' * 900}" for i in range(1000)]},
        {"alpha_pattern": {"q_proj": float("inf")}},
        {"target_modules": ""},
        {"target_modules": r".*nothing_so_called"},
    ],
    ids=lambda change: str(change)[:60],
)
def test_a_config_of_another_form_is_refused_in_words(run: Run, tmp_path: Path, change: dict[str, Any]) -> None:
    run(SaveAdapterJob(adapter=1, path=tmp_path / "saved"))
    path = tmp_path / "saved" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((InvalidArgument, FailedPrecondition)) as refused:
        run(LoadAdapterJob(uid=9, name="nine", kind=AdapterKind.POLICY, path=tmp_path / "saved"))
    assert refused.value.reason != "INTERNAL"
    assert len(refused.value.message) < 1500


def refused_tensors(run: Run, path: Path, **more: Any) -> InvalidArgument | FailedPrecondition:
    (path / "onebase.json").unlink(missing_ok=True)  # as PEFT writes it: without hashes
    with pytest.raises((InvalidArgument, FailedPrecondition)) as refused:
        run(LoadAdapterJob(uid=9, name="nine", kind=AdapterKind.POLICY, path=path, **more))
    assert refused.value.field == "path"
    return refused.value


@pytest.mark.parametrize(
    ("file", "dtype", "number"),
    [
        ("adapter_model", torch.float64, 1e300),
        ("adapter_model", torch.float64, float("nan")),
        ("value_head", torch.float64, 1e39),
        ("optimizer", torch.float64, -1e300),
    ],
)
def test_numbers_that_are_infinite_here_are_refused(
    run: Run, tmp_path: Path, file: str, dtype: torch.dtype, number: float
) -> None:
    run(SaveAdapterJob(adapter=1, path=tmp_path / "saved", with_optimizer=True))
    path = tmp_path / "saved" / f"{file}.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    tensors[max(tensors, key=lambda name: tensors[name].numel())].view(-1)[0] = number
    save_file(tensors, path)
    assert refused_tensors(run, tmp_path / "saved", with_optimizer=True).reason == "NONFINITE_TENSOR"


def test_numbers_that_are_infinite_in_what_the_base_computes_in_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.tensor([65504.0, 70000.0]), "step": torch.tensor(2**52)}, path)
    assert StoredTensors(path, 2).take("a", (2,)).tolist() == [65504, 70000]
    assert int(StoredTensors(path, 2).take("step", ())) == 2**52
    with pytest.raises(InvalidArgument, match="infinite in float16"):
        StoredTensors(path, 2).take("a", (2,), torch.float16)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", torch.tensor(-1)),
        ("step", torch.tensor(2**53)),
        ("step", torch.tensor(-0.7 - 1)),
        ("step", torch.tensor(float("inf"))),
        ("exp_avg_sq", -1e-3),
        ("exp_avg", float("inf")),
        ("exp_avg_sq", float("nan")),
    ],
    ids=str,
)
def test_moments_that_no_optimizer_has_are_refused(run: Run, tmp_path: Path, key: str, value: Any) -> None:
    step(run, 1)
    run(SaveAdapterJob(adapter=1, path=tmp_path / "saved", with_optimizer=True))
    path = tmp_path / "saved" / "optimizer.safetensors"
    tensors = load_file(path)
    if key == "step":
        tensors["step"] = value
    else:
        tensors[next(name for name in tensors if name.startswith(f"{key}."))].view(-1)[1] = value
    save_file(tensors, path)
    found = refused_tensors(run, tmp_path / "saved", with_optimizer=True)
    assert found.reason in ("BAD_OPTIMIZER_STATE", "NONFINITE_TENSOR")
    assert key in found.message


@pytest.mark.parametrize("alpha", [1e300, 3.5e38])
def test_a_scaling_that_is_infinite_here_is_refused(run: Run, tmp_path: Path, alpha: float) -> None:
    run(SaveAdapterJob(adapter=1, path=tmp_path / "saved"))
    path = tmp_path / "saved" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": alpha, "r": 1, "use_rslora": True}))
    assert "infinite" in refused_tensors(run, tmp_path / "saved").message


@pytest.mark.parametrize("file", ["adapter_model", "value_head", "optimizer"])
def test_a_header_of_very_many_tensors_is_not_read(run: Run, tmp_path: Path, file: str) -> None:
    run(SaveAdapterJob(adapter=1, path=tmp_path / "saved", with_optimizer=True))
    one = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{i}": one for i in range(30_000)}).encode()
    (tmp_path / "saved" / f"{file}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    began = time.process_time()
    found = refused_tensors(run, tmp_path / "saved", with_optimizer=True)
    assert found.reason == "BAD_SAFETENSORS"
    assert f"a header of {len(header)} bytes" in found.message
    assert time.process_time() - began < 1


def test_tensors_that_belong_to_nothing_are_not_made(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(SaveAdapterJob(adapter=1, path=tmp_path / "saved"))
    path = tmp_path / "saved" / "adapter_model.safetensors"
    save_file({**load_file(path), "strange\nthing": torch.zeros(1), "z" * 5000: torch.zeros(1)}, path)
    found = refused_tensors(run, tmp_path / "saved")
    assert found.reason == "UNKNOWN_TENSORS"
    assert "\n" not in found.message
    assert len(found.message) < 1500


def test_a_manifests_words_make_no_line_of_the_log(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(SaveAdapterJob(adapter=1, path=tmp_path / "saved"))
    path = tmp_path / "saved" / "onebase.json"
    manifest = json.loads(path.read_text())
    manifest["base"]["dtype"] = "x\nERROR onebase: forged \x1b[31m" + "y" * 100_000
    path.write_text(json.dumps(manifest))
    run(LoadAdapterJob(uid=9, name="nine", kind=AdapterKind.POLICY, path=tmp_path / "saved"))
    said = [record.getMessage() for record in caplog.records if "was trained on the base in" in record.getMessage()]
    assert said
    assert not [one for one in said if "\n" in one or "\x1b" in one or len(one) > 1500]
