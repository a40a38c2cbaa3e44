"""The shape of latest.json and of the page next to it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import report
from growth import Line, Plot
from measure import Figure
from registry import CASES, Case
from rich.console import Console

KEYS = [
    "prefill_mixed8_over_base_171m_bf16",
    "prefill_mixed8_over_base_39m_bf16",
    "prefill_mixed8_over_peft_mixed_171m_bf16",
    "decode_mixed8_over_base_39m_fp32_b8",
    "decode_mixed8_over_base_171m_bf16_b32",
    "decode_mixed8_over_peft_serial_39m_fp32_b8",
    "generate_over_padded_generate",
    "score_over_right_padded_times_fill",
    "fused_score_over_three_peft_passes_bf16",
    "fused_score_over_three_peft_passes_fp32",
    "train4_over_one_adapter",
    "ppo_iteration_over_trl_1",
    "ppo_iterations_over_trl_4",
    "memory_4_policies_over_trl_4",
    "adapter_bytes_over_own",
    "reward_latency_loaded_over_idle",
    "generate_vs_logprob_max_abs_exact",
    "cross_policy_gradient_max_abs",
    "mixed_vs_solo_gradient_max_abs",
    "logprob_peak_over_full_logits_128k",
    "rpc_overhead_fraction",
]


def faster(bench: object) -> Figure:
    """Theirs over ours: some work."""
    raise NotImplementedError


HIGHER = Case("faster", faster, 1.5)
LOWER = Case("smaller", faster, 0.5, lower=True, unit="fraction")
FIGURE = Figure(1.5, 1.4, 1.6, 9, {"first_seconds": 3.0})


def whole(**ratios: dict[str, Any]) -> report.Report:
    machine = {"cpu": "a CPU", "cores": 2, "memory_gib": 8.0, "load_before": 0.1, "bfloat16": "by the CPU"}
    return {"machine": machine, "versions": {"python": "3"}, "ratios": ratios, "growth": {}}


def test_every_promised_key_is_measured_once_and_names_both_sides() -> None:
    assert sorted(case.key for case in CASES) == sorted(KEYS)
    for case in CASES:
        assert case.sides
        assert not case.sides.endswith(".")
    ratios = [case for case in CASES if case.unit in ("ratio", "fraction")]
    assert all(" over " in case.sides for case in ratios)


def test_a_figure_carries_its_sides_target_and_whether_it_is_met() -> None:
    assert report.entry(HIGHER, FIGURE) == {
        "value": 1.5,
        "low": 1.4,
        "high": 1.6,
        "pairs": 9,
        "detail": {"first_seconds": 3.0},
        "unit": "ratio",
        "sides": "Theirs over ours: some work",
        "target": 1.5,
        "better": "higher",
        "met": True,
    }
    assert not report.entry(LOWER, FIGURE)["met"]
    assert report.entry(LOWER, Figure(0.5, 0.5, 0.5, 1))["met"]


def test_what_could_not_be_measured_says_why_and_is_not_met() -> None:
    found = report.entry(HIGHER, "there is no environment")
    assert found["value"] is None
    assert (found["met"], found["pairs"]) == (False, 0)
    assert found["not_measured"] == "there is no environment"


def test_a_part_run_keeps_the_other_figures_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "latest.json"
    report.write(whole(a=report.entry(HIGHER, FIGURE), b=report.entry(HIGHER, FIGURE)), path)
    again = report.merged(whole(a=report.entry(LOWER, FIGURE)), path, ["b", "a", "c"])
    assert list(again["ratios"]) == ["b", "a"]
    assert again["ratios"]["a"]["unit"] == "fraction"


def test_the_page_shows_every_figure_its_quartiles_and_the_plots(tmp_path: Path) -> None:
    plot = Plot("rank", "Cost", "rank", "cost", (4, 8), [Line("decode", (1.0, 2.0), (1.0, 2.0), (1.0, 2.0))])
    found = whole(a=report.entry(HIGHER, FIGURE), b=report.entry(LOWER, FIGURE), c=report.entry(LOWER, "no Linux"))
    found["growth"] = report.growth_entry([plot])
    report.write(found, tmp_path / "results" / "latest.json")
    page = (tmp_path / "results" / "latest.md").read_text(encoding="utf-8")
    assert "| ✓ | `a` | **1.5** (1.4 – 1.6) | ≥ 1.5 | 9 | Theirs over ours: some work |" in page
    assert "| ✗ | `b` | **1.5** (1.4 – 1.6) | ≤ 0.5 |" in page
    assert "| – | `c` | not measured | ≤ 0.5 | | no Linux |" in page
    assert "![Cost](rank.png)" in page
    written = json.loads((tmp_path / "results" / "latest.json").read_text(encoding="utf-8"))
    assert set(written) == {"machine", "versions", "ratios", "growth"}
    assert written["growth"]["rank"]["lines"][0]["value"] == [1.0, 2.0]


def test_the_terminal_shows_keys_whole() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.table({key: report.entry(HIGHER, FIGURE) for key in KEYS}))
    shown = console.export_text()
    assert all(key in shown for key in KEYS)


def test_the_machine_and_the_versions_are_told() -> None:
    assert report.machine()["cores"] >= 1
    assert {"python", "torch", "transformers", "peft"} <= set(report.versions())
