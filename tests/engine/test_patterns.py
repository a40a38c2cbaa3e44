"""Regular expressions in adapter_config.json: what they mean is what PEFT makes of them, and PEFT never runs them."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from engine.conftest import Run
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from onebase.server.engine import Engine
from onebase.server.errors import FailedPrecondition, InvalidArgument
from onebase.server.jobs import AdapterKind, LoadAdapterJob, SaveAdapterJob

SETTINGS = [
    {"target_modules": r".*\.(q|k|v|o)_proj$"},
    {"target_modules": r"model\.layers\.\d+\.self_attn\.q_proj"},
    {"target_modules": r"model.layers.[0].(self_attn|mlp).[a-z]+_proj", "exclude_modules": r".*\.(k|up)_proj"},
    {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*"},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {r"layers\.0\..*": 3, "q_proj": 5}},
    {
        "target_modules": ["q_proj", "v_proj"],
        "alpha_pattern": {r"^model\..*q_proj": 3, "v_proj": 0.5},
        "use_rslora": True,
    },
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v": 3}, "exclude_modules": "v_proj"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": None},
    {
        "target_modules": ["q_proj", "self_attn.v_proj", "proj", "nothing", "a.q_proj"],
        "exclude_modules": ["x", "1.mlp"],
    },
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj", "no"]},
    {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": [1]},
    {
        "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj", *(f"no{i}" for i in range(30))],
        "layers_to_transform": [1],
    },
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["no", "layers"]},
]


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:You have passed exclude_modules:UserWarning")
@pytest.mark.filterwarnings("ignore:.*use_rslora:UserWarning")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_they_mean_what_peft_means(engine: Engine, settings: dict[str, Any]) -> None:
    config = LoraConfig(r=8, lora_alpha=4, task_type="CAUSAL_LM", **settings)
    model = inject_adapter_in_model(config, copy.deepcopy(engine.formats._skeleton), low_cpu_mem_usage=True)
    wanted = {
        name: (module.r["default"], pytest.approx(module.scaling["default"]))
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    found = engine.formats.targets(LoraConfig(r=8, lora_alpha=4, task_type="CAUSAL_LM", **settings), "path")
    assert {name: (target.rank, target.scaling) for name, target in found.items()} == wanted
    assert wanted


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["no", "none"]}, {"target_modules": ["x.w1"]}, {"target_modules": []}],
    ids=str,
)
def test_names_of_nothing_say_what_peft_says(engine: Engine, settings: dict[str, Any]) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", **settings)
    with pytest.raises(ValueError, match=r"\w") as told:
        inject_adapter_in_model(config, copy.deepcopy(engine.formats._skeleton), low_cpu_mem_usage=True)
    with pytest.raises(FailedPrecondition) as refused:
        engine.formats.targets(LoraConfig(task_type="CAUSAL_LM", **settings), "path")
    assert str(told.value).split("{")[0] in refused.value.message


NAMES = [f"z{i:05d}" for i in range(1022)]
LARGEST: dict[str, dict[str, Any]] = {
    "target_modules": {"target_modules": ["q_proj", *NAMES]},
    "long names": {"target_modules": ["q_proj", *(f"{'x.' * 1000}{name}" for name in NAMES)]},
    "exclude_modules": {"exclude_modules": NAMES},
    "layers_pattern": {"layers_to_transform": [0, 1, *range(5, 1000)], "layers_pattern": ["layers", *NAMES[:15]]},
    "rank_pattern": {"rank_pattern": dict.fromkeys(NAMES, 4), "alpha_pattern": dict.fromkeys(NAMES, 4)},
    "odd ranks": {"rank_pattern": {".*": 4, **{f"(a|b{i})": 4 for i in range(1000)}}},
    "long ranks": {"rank_pattern": {f"(a|b{i})" + "[ab]" * 500: 4 for i in range(1000)}},
}


@pytest.mark.filterwarnings("ignore:You have passed exclude_modules:UserWarning")
@pytest.mark.parametrize("settings", LARGEST.values(), ids=LARGEST)
def test_the_largest_lists_take_less_than_a_second(run: Run, tmp_path: Path, settings: dict[str, Any]) -> None:
    run(SaveAdapterJob(adapter=1, path=tmp_path / "saved"))
    path = tmp_path / "saved" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    began = time.process_time()
    with contextlib.suppress(InvalidArgument, FailedPrecondition):
        run(LoadAdapterJob(uid=9, name="nine", kind=AdapterKind.POLICY, path=tmp_path / "saved"))
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("setting", "value", "most"),
    [
        ("target_modules", ["q_proj"] * 1025, 1024),
        ("exclude_modules", NAMES * 2, 1024),
        ("layers_to_transform", [0] * 1025, 1024),
        ("layers_pattern", ["layers"] * 17, 16),
        ("rank_pattern", dict.fromkeys([*NAMES, "a", "b", "c"], 4), 1024),
        ("alpha_pattern", dict.fromkeys([*NAMES, "a", "b", "c"], 4), 1024),
        ("modules_to_save", ["score"] * 1025, 1024),
        ("eva_config", dict.fromkeys([*NAMES, "a", "b", "c"], 4), 1024),
    ],
)
def test_longer_lists_are_refused_by_name(run: Run, tmp_path: Path, setting: str, value: Any, most: int) -> None:
    run(SaveAdapterJob(adapter=1, path=tmp_path / "saved"))
    path = tmp_path / "saved" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    with pytest.raises(InvalidArgument, match=f"in '{setting}', and {most} are the most") as refused:
        run(LoadAdapterJob(uid=9, name="nine", kind=AdapterKind.POLICY, path=tmp_path / "saved"))
    assert refused.value.reason == "BAD_CONFIG"


HOSTILE = [r"(a+)+$", r"(.*.*)*.x", r"(.|.)" * 40 + "Z", r"(?=(.*)*)x", r"(.*)\1", "(" * 500, "x" * 5000]


@pytest.mark.parametrize("pattern", HOSTILE, ids=lambda pattern: pattern[:20])
@pytest.mark.parametrize(
    "setting",
    ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern", "modules_to_save"],
)
def test_a_hostile_one_holds_nobody_up(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, pattern: str
) -> None:
    run(SaveAdapterJob(adapter=1, path=tmp_path / "saved"))
    path = tmp_path / "saved" / "adapter_config.json"
    value: Any = {pattern: 2} if setting in ("rank_pattern", "alpha_pattern") else pattern
    more: dict[str, Any] = {}
    if setting in ("layers_pattern", "modules_to_save"):
        value = [pattern]
    if setting == "layers_pattern":
        more = {"layers_to_transform": [0]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value} | more))
    ran = []
    for name in ("match", "fullmatch", "search"):
        original = getattr(re, name)
        monkeypatch.setattr(
            re, name, lambda one, *rest, was=original, **more: (ran.append(one), was(one, *rest, **more))[1]
        )
    began = time.process_time()
    with contextlib.suppress(InvalidArgument, FailedPrecondition):  # in some settings it matches nothing, and is fine
        run(LoadAdapterJob(uid=9, name="nine", kind=AdapterKind.POLICY, path=tmp_path / "saved"))
    assert time.process_time() - began < 5
    assert not [one for one in ran if pattern in str(one)]


def test_the_setting_and_the_way_out_are_named(run: Run, tmp_path: Path) -> None:
    run(SaveAdapterJob(adapter=1, path=tmp_path / "saved"))
    path = tmp_path / "saved" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": r"(?!.*x).*_proj"}))
    with pytest.raises(InvalidArgument, match=r"in target_modules: .*list the modules' names instead") as refused:
        run(LoadAdapterJob(uid=9, name="nine", kind=AdapterKind.POLICY, path=tmp_path / "saved"))
    assert refused.value.reason == "BAD_PATTERN"
