"""Whose a URL of checkpoints is, and what becomes of it when the registry is lost: with a fake worker."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace

import grpc
import pytest
from bucket import BucketServer, register
from server.fakes import FACTS
from server.harness import Clock, Live, eventually, refused
from server.stateful import StateWorker, committed, create, step, version

from onebase.server.checkpoints import StateDirectory
from onebase.server.config import ConfigError, EngineConfig, ServerConfig, StateConfig
from onebase.server.durability import RESERVED_VERSIONS
from onebase.server.opening import open_durable
from onebase.v1 import adapters_pb2, sessions_pb2

URL = "bucket://b/run"


class UrlWorker(StateWorker):
    """Reads the version of what comes out of a spool, too."""

    def _LoadAdapterJob(self, job):
        facts = super()._LoadAdapterJob(job)
        written = json.loads(self.read["onebase.json"])["version"]
        return self._change(facts.uid, version=max(written, job.least_version))


@pytest.fixture
def store(tmp_path, monkeypatch):
    with BucketServer() as server:
        register(tmp_path / "driver", server, monkeypatch)
        yield server


@pytest.fixture
def serve(tmp_path, store):
    """Starts a server on a state directory of that name, with checkpoints in the bucket."""

    @contextmanager
    def start(name="state", facts=FACTS, **state):
        config = StateConfig(tmp_path / name, **{"seconds": 0.0, "durability": "step", "checkpoints": URL, **state})
        worker, directory = UrlWorker(facts), StateDirectory(config.path, config.checkpoints)
        try:
            keeper = open_durable(worker, directory, config)
            server = ServerConfig(EngineConfig(model="fake"), port=0, drain_seconds=5, state=config, roots=(tmp_path,))
            with Live(server, worker, Clock(), keeper) as live:
                live.keeper = keeper
                live.session = live.sessions.OpenSession(sessions_pb2.OpenSessionRequest(ttl_seconds=60)).session_id
                yield live
        finally:
            directory.close()

    return start


def lost(tmp_path, name="state"):
    shutil.rmtree(tmp_path / name)


def damage(store, folder):
    [key] = [one for one in store.objects if f"/{folder}/" in one and one.endswith("onebase.json")]
    store.objects[key] += b" "


def test_it_goes_on_from_the_bucket(serve, store, tmp_path):
    with serve(keep=2) as live:
        create(live)
        for _ in range(3):
            step(live)
        eventually(lambda: len(store.folders("b/run/")) == 3)  # two checkpoints and the owner
        assert not list((tmp_path / "state" / "transit").iterdir())
    with serve() as live:
        assert version(live) == 3
        assert committed(live) == [3, 2]


def test_a_bucket_belongs_to_one_state(serve, tmp_path):
    with serve() as live:
        create(live)
    with pytest.raises(ConfigError, match=r"belongs to the state .*--adopt"), serve("other"):
        pass
    with serve("other", adopt=True) as live:
        assert version(live) == 0
    with pytest.raises(ConfigError, match="belongs to the state"), serve():  # the one that was taken for lost
        pass
    with pytest.raises(ConfigError, match="adapters of its own"), serve(adopt=True):
        pass


def test_a_url_that_another_state_adopted_is_not_taken_back(serve):
    """A server that starts again with its command line has --adopt in it, and may have no adapters just then."""
    with serve() as live:
        create(live)
    with serve("other", adopt=True) as live:
        live.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(session_id="", name="p"))
    with serve("third", adopt=True):
        pass
    with pytest.raises(ConfigError, match="it is not taken back"), serve("other", adopt=True):
        pass
    with serve("third", adopt=True):
        pass


def test_what_was_adopted_goes_on_where_the_command_line_stays(serve, tmp_path):
    with serve() as live:
        create(live)
        step(live)
    lost(tmp_path)
    for number in (1, 2, 3):
        with serve(adopt=True, keep=1) as live:
            assert version(live) == number
            assert step(live).adapter.version == number + 1
            live.sessions.CloseSession(sessions_pb2.CloseSessionRequest(session_id=live.session))


def test_a_state_whose_checkpoints_lie_elsewhere_is_refused(serve):
    with serve() as live:
        create(live)
    with pytest.raises(ConfigError, match=f"give --checkpoints {URL}"), serve(checkpoints=""):
        pass
    with pytest.raises(ConfigError, match=f"give --checkpoints {URL}"), serve(checkpoints="bucket://b/elsewhere"):
        pass


def test_a_bucket_that_was_copied_with_its_owner_is_the_states_own(serve, store):
    with serve() as live:
        create(live)
    for key in list(store.objects):
        store.objects[key.replace("b/run", "b/copy")] = store.objects.pop(key)
    with serve(checkpoints="bucket://b/copy") as live:
        assert version(live) == 0


def test_adapters_are_adopted_where_the_registry_is_lost(serve, tmp_path, store):
    with serve() as live:
        create(live, "p")
        create(live, "q")
        step(live, "p")
        create(live, "again")
        live.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(session_id=live.session, name="again"))
        create(live, "again")
        before = {name: live.on_loop(live.edge.registry.get, name, "name") for name in ("p", "q", "again")}
    lost(tmp_path)
    store.objects["b/run/000099-00112233aabb/weights"] = b"half"
    with pytest.raises(ConfigError, match="--adopt"), serve():
        pass
    with serve(adopt=True) as live:
        for name, wanted in before.items():
            found = live.on_loop(live.edge.registry.get, name, "name")
            assert (found.uid, found.create_time, found.source) == (wanted.uid, wanted.create_time, wanted.source)
            assert (found.kind, found.facts.version) == (wanted.kind, wanted.facts.version)
        assert "000099-00112233aabb" not in store.folders("b/run/")
        create(live, "new")
        assert live.uid("new") > 99  # a uid that was given once, by whomever
        step(live, "p")
    with serve() as live:  # which is its owner now
        assert version(live, "p") == 2


def test_the_newest_version_that_is_whole_is_adopted(serve, tmp_path, store):
    with serve(keep=3) as live:
        create(live)
        step(live)
        step(live)
    [newest] = [one for one in store.folders("b/run/") if _version(store, one) == 2]
    damage(store, newest)
    lost(tmp_path)
    with serve(adopt=True, keep=3) as live:
        assert version(live) == 3  # of version 1's weights; version 2 was given
        assert committed(live) == [1, 0]
        assert newest not in store.folders("b/run/")


def _version(store, folder):
    for key, data in store.objects.items():
        if f"/{folder}/" in key and key.endswith("registry.json"):
            return json.loads(data)["checkpoint"]["version"]
    return None


def test_versions_that_may_have_been_seen_are_not_given_again_after_an_adoption(serve, tmp_path):
    with serve(durability="checkpoint") as live:
        create(live)
        step(live)
        live.keeper._tracks.clear()  # as after kill -9
    lost(tmp_path)
    with serve(adopt=True, durability="checkpoint") as live:
        assert version(live) == RESERVED_VERSIONS + 1


@pytest.mark.parametrize("moment", ["adopt", "claim"])
def test_an_adoption_that_was_interrupted_is_finished(serve, tmp_path, monkeypatch, moment):
    with serve() as live:
        create(live)
        step(live)
    lost(tmp_path)

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        where = "onebase.server.store.Store.adopt" if moment == "adopt" else "onebase.server.storage.Bucket.claim"
        patch.setattr(where, dies)
        with pytest.raises(KeyboardInterrupt), serve(adopt=True):
            pass
    with serve(adopt=moment == "adopt") as live:
        assert version(live) == 1


def test_the_bucket_of_another_base_is_not_adopted(serve, tmp_path):
    with serve() as live:
        create(live)
    lost(tmp_path)
    with pytest.raises(ConfigError, match="base 'fake'"), serve(facts=replace(FACTS, fingerprint="0" * 64), adopt=True):
        pass


def test_what_is_written_beside_a_checkpoint_is_not_trusted(serve, tmp_path, store):
    with serve() as live:
        create(live, "p")
        create(live, "q")
    lost(tmp_path)
    for key in [key for key in store.objects if key.endswith("registry.json")]:
        about = json.loads(store.objects[key])
        if about["adapter"]["name"] == "p":
            about["adapter"]["name"] = "../p"
            store.objects[key] = json.dumps(about).encode()
    with serve(adopt=True) as live:
        assert [one.name for one in live.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest()).adapters] == ["q"]


def test_a_store_that_is_away_refuses_a_step_until_its_retry_makes_it_durable(serve, store):
    with serve() as live:
        create(live)
        store.status = 503
        for _ in range(2):
            refusal = refused(step, live, request_id="a")
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_AWAY")
            assert refusal.retry_after
            assert URL in refusal.message
        assert refused(create, live, "other").reason == "STORE_AWAY"
        assert refused(version, live, "other").reason == "ADAPTER_NOT_FOUND"
        live.sessions.OpenSession(sessions_pb2.OpenSessionRequest(ttl_seconds=60))  # which needs no bucket
        store.status = 200
        assert step(live, request_id="a").adapter.version == 1
        assert committed(live) == [1, 0]
    with serve() as live:
        assert version(live) == 1


def test_a_store_that_is_away_at_the_start_is_told_and_nothing_is_called_damaged(serve, store):
    with serve() as live:
        create(live)
    store.status = 503
    with pytest.raises(ConfigError, match="cannot be read just now"), serve():
        pass
    store.status = 200
    with serve() as live:
        assert version(live) == 0
