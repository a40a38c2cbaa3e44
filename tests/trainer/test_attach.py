"""How a run begins: the policy found, made or brought back, and its lease taken."""

import numpy as np
import pytest
from trainer.toy import ToyAdapter, ToyServer

from onebase.client.types import LoraSpec
from onebase.trainer.attach import attach
from onebase.trainer.checkpoint import AdapterMark, TrainerState
from onebase.trainer.config import PolicyConfig
from onebase.trainer.parsing import ConfigError

POLICY = PolicyConfig(name="p", rank=4, alpha=8, target_modules=("q_proj",), use_rslora=True, seed=9)


def calls(server, kind):
    return [call for name, call in server.calls if name == kind]


def state_of(server, path=""):
    adapter = server.adapters["p"]
    fields = {
        "policy": "p",
        "step": 3,
        "prompts_taken": 0,
        "rng": {},
        "algorithm": "ppo",
        "learner": {},
        "kl": None,
        "before": None,
        "latest": None,
        "adapter": AdapterMark(path, adapter.version, adapter.create_time),
        "critic": None,
    }
    return TrainerState(**fields)


def test_a_policy_that_is_not_there_is_made_with_a_value_head():
    server = ToyServer()
    session, origin = attach(server.client(), POLICY, None)
    lora = LoraSpec(rank=4, alpha=8, target_modules=("q_proj",), use_rslora=True)
    assert calls(server, "create_adapter") == [{"name": "p", "lora": lora, "seed": 9}]
    assert server.adapters["p"].value_head
    assert session.ppo_adapter_name == "p"
    assert origin == "made p (rank 4)"


def test_a_policy_that_is_there_is_trained_on_from_where_it_is():
    server = ToyServer()
    server.adapters["p"] = ToyAdapter("p", 1.0, version=5)
    session, origin = attach(server.client(), POLICY, None)
    assert session.ppo_adapter_name == "p"
    assert origin == "found p on the server, version 5"
    assert server.adapters["p"].version == 5


@pytest.mark.parametrize(
    ("adapter", "create", "message"),
    [
        (None, False, "policy.name: 'p' is not on the server"),
        (ToyAdapter("p", 1.0, kind="reward"), True, "policy.name: 'p' is a reward adapter"),
        (ToyAdapter("p", 1.0, value_head=False), True, "policy.name: 'p' has no value head"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_its_lease_given_back(adapter, create, message):
    server = ToyServer()
    if adapter is not None:
        server.adapters["p"] = adapter
    with pytest.raises(ConfigError, match=message):
        attach(server.client(), PolicyConfig(name="p", create=create), None)
    assert server.sessions == {}


def test_an_untouched_policy_is_gone_on_with_in_the_same_session():
    server = ToyServer()
    first, _ = attach(server.client(), POLICY, None)
    session, origin = attach(server.client(), POLICY, state_of(server), last_session=first.id)
    assert session.id == first.id
    assert origin == "going on after step 3: p is on the server as it was left"
    assert not calls(server, "load_adapter")


def test_a_run_that_died_before_its_first_checkpoint_gives_its_lease_back_to_the_one_that_begins_anew():
    server = ToyServer()
    died, _ = attach(server.client(), POLICY, None)
    session, _ = attach(server.client(), POLICY, None, last_session=died.id)
    assert list(server.sessions) == [session.id]
    assert session.id != died.id


def test_a_session_that_is_gone_does_not_matter_where_the_policy_is_untouched():
    server = ToyServer()
    first, _ = attach(server.client(), POLICY, None)
    state = state_of(server)
    first.close()
    session, _ = attach(server.client(), POLICY, state, last_session=first.id)
    assert session.id != first.id
    assert not calls(server, "load_adapter")


@pytest.mark.parametrize("change", ["trained", "gradients", "made anew", "gone"])
def test_a_policy_that_is_not_as_it_was_left_is_read_from_its_checkpoint(change):
    server = ToyServer()
    first, _ = attach(server.client(), POLICY, None)
    server.adapters["p"].weights += 1.5
    path = first.save_adapter("p/3", name="p", with_optimizer=True).path
    state = state_of(server, path=path)
    if change == "trained":
        server.adapters["p"].version += 1
    elif change == "gradients":
        server.adapters["p"].pending = 1
    elif change == "made anew":
        server.adapters["p"] = ToyAdapter("p", create_time=99.0, version=state.adapter.version)
    else:
        server.restart()
    session, origin = attach(server.client(), POLICY, state)
    assert calls(server, "load_adapter") == [{"path": path, "replace": change != "gone"}]
    assert origin == f"going on after step 3: p was read from {path}"
    assert session.ppo_adapter_name == "p"
    np.testing.assert_array_equal(server.adapters["p"].weights, 1.5)


def test_without_a_checkpoint_a_changed_policy_cannot_be_gone_on_with():
    server = ToyServer()
    attach(server.client(), POLICY, None)
    state = state_of(server)
    server.adapters["p"].version += 1
    with pytest.raises(ConfigError, match="resume: p is not on the server as step 3 left it"):
        attach(server.client(), POLICY, state)
