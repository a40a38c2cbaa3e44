"""Draws what a soak saw, a panel per series."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from soak.watch import Samples

_MIB = 2.0**20
_PANELS = (("rss_bytes", "RSS, MiB", _MIB), ("descriptors", "descriptors", 1.0), ("threads", "threads", 1.0),
           ("state_bytes", "state directory, MiB", _MIB), ("rows_responses", "answers kept", 1.0))  # fmt: skip


def draw(samples: Samples, warm_up: float, folder: Path) -> Path:
    """Writes soak.png; the shade is the time before anything is judged, in seconds."""
    minutes = [one / 60 for one in samples.seconds]
    figure, panels = plt.subplots(len(_PANELS), 1, figsize=(6.4, 9.0), sharex=True, layout="constrained")
    for axes, (name, label, unit) in zip(panels, _PANELS, strict=True):
        axes.plot(minutes, [value / unit for value in samples.series[name]], linewidth=0.8)
        axes.axvspan(0, warm_up / 60, alpha=0.1)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("minutes")
    path = folder / "soak.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
