"""What a trainer must remember to go on: its state as a small JSON file; the adapter itself the server saves."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from onebase.client.types import Adapter
from onebase.trainer.evaluation import Evaluation
from onebase.trainer.parsing import ConfigError

STATE_FILE = "trainer_state.json"


@dataclass(frozen=True)
class AdapterMark:
    """An adapter at one moment, and where it was saved."""

    path: str
    """Where the server saved it with its optimizer; "" if it could not."""
    version: int
    """Its version at this moment."""
    create_time: float
    """With the version: tells this adapter from another of the same name."""

    def is_on_server(self, adapter: Adapter | None) -> bool:
        """Whether the server's adapter is, untouched, the one of this moment."""
        return (
            adapter is not None
            and adapter.version == self.version
            and adapter.create_time == self.create_time
            and adapter.pending_gradients == 0
        )


@dataclass(frozen=True)
class TrainerState:
    """A run between two steps. With the adapter of that moment it is all that the next step depends on."""

    policy: str
    """The policy's name."""
    step: int
    """Steps done."""
    prompts_taken: int
    """Position in the prompts' order."""
    rng: Mapping[str, Any]
    """State of the generator of seeds and minibatches."""
    algorithm: str
    """What trains it."""
    learner: Mapping[str, Any]
    """What the algorithm keeps from step to step."""
    kl: float | None
    """objective/kl of the last step, if it had one."""
    before: Evaluation | None
    """The evaluation before the first step."""
    latest: Evaluation | None
    """The newest evaluation."""
    session_id: str
    """The session, to take up again while it lives. A secret."""
    adapter: AdapterMark
    """The policy."""
    critic: AdapterMark | None
    """PPO's critic, if it is an adapter of its own."""


def save_state(directory: Path, state: TrainerState) -> None:
    """Writes the state so that a crash leaves either the old one or the new one."""
    data = {field.name: getattr(state, field.name) for field in fields(state)}
    for name in ("before", "latest"):
        data[name] = None if data[name] is None else data[name].as_json()
    for name in ("adapter", "critic"):
        data[name] = None if data[name] is None else asdict(data[name])
    write_json(directory / STATE_FILE, data)


def load_state(directory: Path) -> TrainerState | None:
    """The state of the run in a directory; None if there is none.

    Raises:
        ConfigError: the file is not what save_state writes.
    """
    path = directory / STATE_FILE
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        for name in ("before", "latest"):
            data[name] = None if data[name] is None else Evaluation.from_json(data[name])
        data["adapter"] = AdapterMark(**data["adapter"])
        data["critic"] = None if data["critic"] is None else AdapterMark(**data["critic"])
        return TrainerState(**data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError("resume", f"{path} is not a trainer's state ({error}); use resume: never") from error


def write_json(path: Path, data: object) -> None:
    """Writes JSON by way of a temporary file: written, synced, renamed, and the directory synced."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
