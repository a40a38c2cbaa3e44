"""Draws how cost grows, one picture per axis."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from growth import Plot
from matplotlib import pyplot as plt


def draw(plot: Plot, folder: Path) -> Path:
    """Writes NAME.png; the shade is from quartile to quartile."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for line in plot.lines:
        axes.plot(plot.x, line.value, marker="o", label=line.label)
        axes.fill_between(plot.x, line.low, line.high, alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(plot.x), [f"{x:g}" for x in plot.x])
    axes.set_ylim(bottom=0)
    axes.set(title=plot.title, xlabel=plot.x_label, ylabel=plot.y_label)
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / f"{plot.name}.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
