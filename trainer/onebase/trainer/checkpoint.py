"""What a trainer must remember to go on: its state as a small JSON file; the adapter itself the server saves."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from onebase.client.types import Adapter
from onebase.trainer.evaluation import Evaluation
from onebase.trainer.parsing import ConfigError

STATE_FILE = "trainer_state.json"
SESSION_FILE = "session.json"
LOCK_FILE = ".lock"


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


def save_session(directory: Path, session_id: str) -> None:
    """Notes the session that trains, a secret, so that the next run has its lease at once, whatever ends this one."""
    write_json(directory / SESSION_FILE, {"session_id": session_id})


def load_session(directory: Path) -> str:
    """The session of the last run in a directory; "" if none is known."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return str(json.loads((directory / SESSION_FILE).read_text(encoding="utf-8"))["session_id"])
    return ""


@contextlib.contextmanager
def sole_run(directory: Path) -> Iterator[None]:
    """Keeps other runs out of a directory while the block runs; one that was killed keeps nobody out.

    Raises:
        ConfigError: another run is there.
    """
    with (directory / LOCK_FILE).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                "output_dir", f"another run writes to {directory}; wait for its end, or set another output_dir"
            ) from None
        yield


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
