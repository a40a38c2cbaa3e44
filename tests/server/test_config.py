from __future__ import annotations

from pathlib import Path

import pytest

from onebase.server.config import AdapterSource, ConfigError, EngineConfig, Limits, ServerConfig

ENGINE = EngineConfig(model="m")
HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("port", {"port": 65536}),
        ("port", {"port": -1}),
        ("drain_seconds", {"drain_seconds": -1.0}),
        ("drain_seconds", {"drain_seconds": float("inf")}),
        ("policy_rank", {"policy_rank": 0}),
        ("policy_rank", {"policy_rank": 9, "limits": Limits(max_rank=8)}),
        ("policy_alpha", {"policy_alpha": 0.0}),
        ("policy_alpha", {"policy_alpha": float("nan")}),
        ("root", {"roots": (HERE / "test_config.py",)}),
        ("adapter", {"policies": (AdapterSource("a b", None),)}),
        ("adapter", {"policies": (AdapterSource("base", None),)}),
        ("adapter", {"policies": (AdapterSource("a", None), AdapterSource("a", None))}),
        ("adapter", {"policies": (AdapterSource("a", None),), "rewards": (AdapterSource("a", HERE),)}),
        ("adapter", {"rewards": (AdapterSource("a", None),)}),
        ("adapter", {"references": (AdapterSource("a", None),)}),
    ],
)
def test_a_setting_that_cannot_work_is_named(key, settings):
    with pytest.raises(ConfigError) as caught:
        ServerConfig(engine=ENGINE, **settings)
    assert str(caught.value).startswith(f"{key} is ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", ""),
        ("device", "tpu"),
        ("device", "cuda:x"),
        ("dtype", "int8"),
        ("quantization", "int4"),
        ("threads", -1),
        ("max_context", -1),
        ("chat_template", HERE / "nowhere.jinja"),
    ],
)
def test_so_is_one_of_the_engine(key, value):
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**{"model": "m", key: value})
    assert str(caught.value).startswith(f"{key} is ")


def test_limits_are_at_least_1():
    with pytest.raises(ConfigError, match="max_rank is 0"):
        Limits(max_rank=0)
