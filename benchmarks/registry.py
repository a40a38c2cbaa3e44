"""All cases, by the key under which their figures are reported, each with its target."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from bench import Bench
from cases import decode, exact, generate, latency, memory, ppo, prefill, rpc, score, training
from measure import Figure


@dataclass(frozen=True)
class Case:
    """One figure: how it is found, and what it should be.

    Attributes:
        key: its name in latest.json.
        run: finds it; the first line of its docstring names both sides.
        target: the least it should be, or the most where lower is better.
        lower: whether lower is better.
        unit: what the value counts.
    """

    key: str
    run: Callable[[Bench], Figure]
    target: float
    lower: bool = False
    unit: str = "ratio"

    @property
    def sides(self) -> str:
        """ "A over B", and on which work."""
        return (inspect.getdoc(self.run) or "").splitlines()[0].rstrip(".")

    def met(self, value: float) -> bool:
        """Whether a value reaches the target."""
        return value <= self.target if self.lower else value >= self.target


CASES: tuple[Case, ...] = (
    Case("prefill_mixed8_over_base_171m_bf16", prefill.over_base_171m_bf16, 0.94),
    Case("prefill_mixed8_over_base_39m_bf16", prefill.over_base_39m_bf16, 0.88),
    Case("prefill_mixed8_over_peft_mixed_171m_bf16", prefill.over_peft_mixed_171m_bf16, 1.30),
    Case("decode_mixed8_over_base_39m_fp32_b8", decode.over_base_39m_fp32_b8, 0.85),
    Case("decode_mixed8_over_base_171m_bf16_b32", decode.over_base_171m_bf16_b32, 0.87),
    Case("decode_mixed8_over_peft_serial_39m_fp32_b8", decode.over_peft_serial_39m_fp32_b8, 4.5),
    Case("generate_over_padded_generate", generate.over_padded_generate, 1.6),
    Case("score_over_right_padded_times_fill", score.over_right_padded_times_fill, 1.0),
    Case("fused_score_over_three_peft_passes_bf16", score.fused_bf16, 1.4),
    Case("fused_score_over_three_peft_passes_fp32", score.fused_fp32, 1.08),
    Case("train4_over_one_adapter", training.four_over_one_adapter, 1.0),
    Case("generate_vs_logprob_max_abs_exact", exact.generate_against_logprob, 0.0, lower=True, unit="nats"),
    Case("cross_policy_gradient_max_abs", training.cross_policy_gradient, 0.0, lower=True, unit="gradient"),
    Case("mixed_vs_solo_gradient_max_abs", training.mixed_against_solo_gradient, 0.0, lower=True, unit="gradient"),
    Case("logprob_peak_over_full_logits_128k", memory.logprob_peak_over_full_logits_128k, 0.125, lower=True),
    Case("adapter_bytes_over_own", memory.adapter_bytes_over_own, 1.3, lower=True),
    Case("rpc_overhead_fraction", rpc.overhead_fraction, 0.02, lower=True, unit="fraction"),
    Case("reward_latency_loaded_over_idle", latency.loaded_over_idle, 4.0, lower=True),
    Case("ppo_iteration_over_trl_1", ppo.iteration_over_trl_1, 1.5),
    Case("ppo_iterations_over_trl_4", ppo.iterations_over_trl_4, 2.0),
    Case("memory_4_policies_over_trl_4", ppo.memory_over_trl_4, 0.35, lower=True),
)
