"""What a run shows."""

import io

import pytest
from rich.console import Console

from onebase.trainer.display import LiveDisplay, PlainDisplay, StepReport, make_display, sparkline


def report(step=2, **changes):
    fields = {
        "step": step,
        "steps": 4,
        "reward": 0.5,
        "loss": None,
        "kl": 1.25,
        "kl_coef": 0.2,
        "entropy": 3.0,
        "length": 12.0,
        "tokens_per_second": 340.0,
        "seconds": 1.5,
        "evaluation": None,
        "prompt": "The [bold]film",
        "completion": "was good",
        "completion_reward": 0.75,
    }
    return StepReport(**fields | changes)


def test_elsewhere_than_on_a_terminal_a_step_is_one_line():
    out = io.StringIO()
    with make_display("title", Console(file=out, width=40)) as display:
        assert isinstance(display, PlainDisplay)
        display.note("made [p]")
        display.step(report())
        display.step(report(3, evaluation=-0.25))
    assert out.getvalue().splitlines() == [
        "made [p]",
        "step 2/4  reward +0.5000  kl 1.2500  kl_coef 0.2000  entropy 3.000  length 12.0  340 tokens/s  1.50 s",
        "step 3/4  reward +0.5000  kl 1.2500  kl_coef 0.2000  entropy 3.000  length 12.0  340 tokens/s  1.50 s"
        "  eval -0.2500",
    ]


def test_a_terminal_gets_a_panel_with_the_numbers_the_trend_and_a_sample():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system=None)
    with make_display("train policy_1", console) as display:
        assert isinstance(display, LiveDisplay)
        display.step(report(1, reward=0.0))
        display.step(report(2, reward=1.0, evaluation=0.125))
        display.note("saved")
    shown = out.getvalue()
    for text in (
        "train policy_1",
        "step 2/4",
        "+1.0000 since the first step",
        "1.2500",
        "340",
        "▁█",
        "+0.1250",
        "saved",
    ):
        assert text in shown
    assert "The [bold]film was good" in shown  # a sample is text, not markup
    assert shown.rstrip().endswith("\x1b[?25h")  # the cursor is back


@pytest.mark.parametrize(
    ("values", "bars"),
    [([1.0], "▁"), ([2.0, 2.0], "▁▁"), ([0.0, 1.0], "▁█"), ([7.0, 0.0, 0.5, 1.0], "▁▅█")],
)
def test_sparklines_reach_from_the_lowest_shown_to_the_highest(values, bars):
    assert sparkline(values, width=3) == bars
