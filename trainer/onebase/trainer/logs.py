"""What a run writes down: metrics.jsonl, samples.jsonl and TensorBoard's event files, all in output_dir."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
SUMMARY_FILE = "summary.json"


class RunLog:
    """Appends to a run's files. Lines of steps after `last_step` are dropped first: they will be written anew."""

    def __init__(self, directory: Path, *, last_step: int | None, tensorboard: bool) -> None:
        """Opens the files.

        Args:
            directory: output_dir; it is there.
            last_step: the step that the run goes on from; None begins anew.
            tensorboard: whether to write event files.
        """
        keep = -1 if last_step is None else last_step
        for name in (METRICS_FILE, SAMPLES_FILE):
            _keep_lines(directory / name, keep)
        self._metrics = (directory / METRICS_FILE).open("a", encoding="utf-8")
        self._samples = (directory / SAMPLES_FILE).open("a", encoding="utf-8")
        self._events = EventFile(directory, first_step=keep + 1) if tensorboard else None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._metrics.close()
        self._samples.close()
        if self._events is not None:
            self._events.close()

    def metrics(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes one line of metrics. A number that is not finite becomes null, which JSON has."""
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._metrics.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._metrics.flush()
        if self._events is not None:
            self._events.scalars(step, numbers)

    def sample(self, step: int, sample: Mapping[str, Any]) -> None:
        """Writes one line of samples."""
        self._samples.write(json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n")
        self._samples.flush()


class EventFile:
    """A TensorBoard event file, written by tensorboard's own writer; neither torch nor tensorflow is needed."""

    def __init__(self, directory: Path, *, first_step: int) -> None:
        """Opens a new file in `directory`; events of steps from `first_step` on in older ones are void."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(directory))
        self._write(first_step, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes the numbers of one step."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._write(step, summary=Summary(value=values))
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()

    def _write(self, step: int, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, **what))


def _keep_lines(path: Path, last_step: int) -> None:
    """Drops the lines of later steps, and a line that a crash left half written."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except ValueError:
            continue
        if step <= last_step and line.endswith("\n"):
            kept.append(line)
    path.write_text("".join(kept), encoding="utf-8")
