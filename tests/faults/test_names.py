"""Names of adapters that are none, and paths that never come from names."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from faults import fields
from faults.conftest import Place
from faults.uploads import POLICY, policy, upload
from server.harness import pair, refused
from server.tenants import Client

from onebase.v1 import adapters_pb2, sessions_pb2, training_pb2

pytestmark = [pytest.mark.e2e, pytest.mark.fault(times=2)]

INVALID = grpc.StatusCode.INVALID_ARGUMENT
BAD = ["../x", "a\0b", "a/b", "red/p", ".", "", "ｐ", "p\u202e", "é", "a b", "x" * 65, "-rf"]
STRANGE = ["Strange..Name-With_dots.v2", "CON", "x.safetensors", "0.json", "registry.sqlite"]
"""Valid ones, that a program might take for something else."""


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("names") / "state"


@pytest.fixture(scope="module")
def place(make_place: Callable[..., Place], state: Path) -> Place:
    """A server that keeps what it has on disk."""
    made = make_place("--state", str(state), "--durability", "step")
    shutil.copytree(made.root / "policy", made.root / "red" / "policy")  # whose paths begin there
    return made


@pytest.fixture(scope="module")
def client(place: Place) -> Client:
    return place.as_("red")


@pytest.fixture(scope="module")
def session(client: Client) -> str:
    """A session that may train its policy x."""
    client.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(name="x", value_head=True))
    opened = sessions_pb2.OpenSessionRequest(ppo_adapter_name="x", ttl_seconds=3600)
    return str(client.sessions.OpenSession(opened).session_id)


def there(place: Place, state: Path) -> list[str]:
    """The paths around the roots and in the state."""
    return sorted(str(path) for folder in (place.root.parent, state) for path in folder.rglob("*"))


def test_the_fields_that_name_something_are_all_known() -> None:
    assert fields.unknown() == set()
    assert len(fields.places(fields.ADAPTERS)) > 20


@pytest.mark.parametrize("name", BAD)
def test_20_what_is_no_name_is_refused_by_every_method_and_no_file_is_called_so(
    place: Place, state: Path, client: Client, session: str, name: str
) -> None:
    before, valid = there(place, state), fields.valid(session)
    for field in fields.places(fields.ADAPTERS):
        if not name and field.may_be_empty:
            continue
        messages = fields.put(valid[field.method.name][:1], field.path, name)
        refusal = fields.send(place.channel, client.token, field.method, messages)
        assert refusal is not None, (field.method.name, field.shown)
        wanted = (INVALID, "BAD_ADAPTER_NAME", field.shown.removeprefix("header."))
        assert (refusal.code, refusal.reason, refusal.field) == wanted, (field.method.name, field.shown)
    assert there(place, state) == before


@pytest.mark.parametrize("name", STRANGE)
def test_20_no_path_is_called_after_a_name(place: Place, state: Path, client: Client, name: str) -> None:
    """However the adapter comes to be, and whatever is written of it."""

    def gone() -> None:
        request = adapters_pb2.DeleteAdapterRequest(session_id=session, name=name)
        client.adapters.DeleteAdapter(request)

    session = client.sessions.OpenSession(sessions_pb2.OpenSessionRequest()).session_id
    before = set(there(place, state))
    bad = adapters_pb2.CreateAdapterRequest(session_id=session, name=f"{name}/x")
    assert refused(client.adapters.CreateAdapter, bad).reason == "BAD_ADAPTER_NAME"
    new = client.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(session_id=session, name=name))
    row = training_pb2.TrainingSequence(sequence=pair((5, 6), (7, 8)))
    client.training.ForwardBackward(
        training_pb2.ForwardBackwardRequest(session_id=session, adapter=name, sequences=[row], cross_entropy={})
    )
    step = training_pb2.OptimStepRequest(session_id=session, adapter=name, adamw={"learning_rate": 1e-3})
    assert client.training.OptimStep(step).adapter.version == new.version + 1  # of a name versions go on
    checkpoint = adapters_pb2.CheckpointAdapterRequest(session_id=session, name=name)
    client.adapters.CheckpointAdapter(checkpoint)
    made = set(there(place, state)) - before
    gone()
    client.adapters.UploadAdapter(upload(name, policy(place)))
    made |= set(there(place, state)) - before
    gone()
    load = adapters_pb2.LoadAdapterRequest(session_id=session, name=name, path="policy", kind=POLICY)
    client.adapters.LoadAdapter(load)
    made |= set(there(place, state)) - before
    gone()
    assert len(made) > 10  # it was written
    inside = [path.removeprefix(f"{place.root.parent}/").removeprefix(f"{state}/") for path in made]
    parts = {part.lower() for path in inside for part in path.split("/")}
    ours = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "registry.sqlite",
        "registry.sqlite-wal",
        "registry.sqlite-shm",
    }
    assert not [part for part in parts - ours if name.lower() in part]
    client.sessions.CloseSession(sessions_pb2.CloseSessionRequest(session_id=session))
