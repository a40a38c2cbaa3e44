"""What a run shows while it trains: a live panel on a terminal, one line a step elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_BARS = "▁▂▃▄▅▆▇█"
_TREND_WIDTH = 48


@dataclass(frozen=True)
class StepReport:
    """What is worth seeing of one step; None is what an algorithm does not have."""

    step: int
    steps: int
    reward: float | None
    loss: float | None
    """Where a loss says how well it goes."""
    kl: float | None
    kl_coef: float | None
    entropy: float | None
    length: float
    """Mean tokens of a completion."""
    tokens_per_second: float
    """Tokens written per second of the whole step, training included."""
    seconds: float
    evaluation: float | None
    """Mean reward of an evaluation after this step, if there was one."""
    prompt: str
    completion: str
    completion_reward: float | None

    def line(self) -> str:
        """The step in one line."""
        numbers = (
            _named("reward", self.reward, "+.4f"),
            _named("loss", self.loss, ".4f"),
            _named("kl", self.kl, ".4f"),
            _named("kl_coef", self.kl_coef, ".4f"),
            _named("entropy", self.entropy, ".3f"),
            f"length {self.length:.1f}  {self.tokens_per_second:.0f} tokens/s  {self.seconds:.2f} s",
            _named("eval", self.evaluation, "+.4f"),
        )
        return "  ".join((f"step {self.step}/{self.steps}", *filter(None, numbers)))


class Display(Protocol):
    """A place to show a run."""

    def __enter__(self) -> Display:
        """Begins to show."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends, and leaves the terminal as it was."""
        ...

    def note(self, text: str) -> None:
        """Says something that stays on the screen."""
        ...

    def step(self, report: StepReport) -> None:
        """Shows a finished step."""
        ...


def make_display(title: str, console: Console | None = None) -> Display:
    """A live panel if the console is a terminal, otherwise plain lines."""
    console = console or Console()
    return LiveDisplay(title, console) if console.is_terminal else PlainDisplay(console)


@dataclass
class PlainDisplay:
    """One line a step."""

    console: Console

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def note(self, text: str) -> None:
        """Prints the text."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, report: StepReport) -> None:
        """Prints the step's line."""
        self.note(report.line())


@dataclass
class LiveDisplay:
    """A panel that is drawn anew after every step."""

    title: str
    console: Console
    trend: list[float] = field(default_factory=list)
    _live: Live | None = None

    def __enter__(self) -> LiveDisplay:
        self._live = Live(Text(f"{self.title}: the first step is under way"), console=self.console, auto_refresh=False)
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, text: str) -> None:
        """Prints the text above the panel."""
        self.console.print(text, markup=False, highlight=False)

    def step(self, report: StepReport) -> None:
        """Draws the panel."""
        followed = report.loss if report.reward is None else report.reward
        if followed is not None:
            self.trend.append(followed)
        if self._live is not None:
            self._live.update(render(self.title, report, self.trend), refresh=True)


def render(title: str, report: StepReport, trend: Sequence[float]) -> RenderableType:
    """The panel: progress, numbers, how the reward (or the loss) went from the first step on, and a sample."""
    progress = Table.grid(padding=(0, 1))
    progress.add_row(
        f"step {report.step}/{report.steps}",
        ProgressBar(total=max(report.steps, 1), completed=report.step, width=_TREND_WIDTH),
        f"{report.seconds:.2f} s/step",
    )
    numbers = Table.grid(padding=(0, 2))
    if trend:
        name, change = "loss" if report.reward is None else "reward", trend[-1] - trend[0]
        numbers.add_row(name, f"{trend[-1]:+.4f}", Text(sparkline(trend)), f"{change:+.4f} since the first step")
    if report.kl is not None:
        numbers.add_row("kl", f"{report.kl:.4f}", _named("coefficient", report.kl_coef, ".4f"))
    if report.entropy is not None:
        numbers.add_row("entropy", f"{report.entropy:.3f}")
    numbers.add_row(
        "speed", f"{report.tokens_per_second:.0f}", "tokens/s", f"completions of {report.length:.1f} tokens"
    )
    if report.evaluation is not None:
        numbers.add_row("evaluation", f"{report.evaluation:+.4f}")
    worth = "" if report.completion_reward is None else f"  {report.completion_reward:+.3f}"
    sample = Text.assemble((report.prompt, "dim"), " ", report.completion, (worth, "bold"), overflow="fold")
    return Panel(Group(progress, numbers, sample), title=title, expand=False)


def _named(name: str, value: float | None, form: str) -> str:
    return "" if value is None else f"{name} {value:{form}}"


def sparkline(values: Sequence[float], width: int = _TREND_WIDTH) -> str:
    """The last `width` values as bars, the lowest of them the smallest and the highest the tallest."""
    shown = values[-width:]
    low, high = min(shown), max(shown)
    span = high - low
    return "".join(_BARS[int((value - low) / span * (len(_BARS) - 1) + 0.5) if span else 0] for value in shown)
