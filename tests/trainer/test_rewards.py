"""What a completion is worth."""

import numpy as np
import pytest
from trainer.toy import ToyServer, policy_session

from onebase.trainer.config import GenerationConfig, PromptsConfig, RewardTerm, TrainConfig
from onebase.trainer.parsing import ConfigError
from onebase.trainer.prompts import PromptRow
from onebase.trainer.rewards import Judge, load_function
from onebase.trainer.rollout import roll_out

FUNCTIONS = """
from dataclasses import dataclass

@dataclass
class Weights:
    a: float = 1.0

def lengths(prompts, completions):
    return [len(text) for text in completions]

def labels(prompts, completions, label):
    return [float(x) for x in label]

def everything(prompts, completions, **columns):
    assert sorted(columns) == ["label", "source"]
    return [len(prompt) for prompt in prompts]

def short(prompts, completions): return [1.0]
def words(prompts, completions): return ["good"] * len(completions)
def nothing(prompts, completions): return None
def broken(prompts, completions): return [0.0, float("nan")]
def raising(prompts, completions): raise TypeError("a bug of its own")
number = 3
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    return path


@pytest.fixture
def session():
    return policy_session(ToyServer())


@pytest.fixture
def rollout(session):
    rows = [PromptRow("ab", {"label": 5, "source": "x"}), PromptRow("c", {"label": 7, "source": "y"})]
    return roll_out(session, rows, GenerationConfig(max_new_tokens=4), seed=1)


def judge(**settings):
    return Judge(TrainConfig(prompts=PromptsConfig("p"), **settings))


def test_adapters_are_summed_by_weight_in_one_call(session, rollout):
    terms = (RewardTerm("good", -2.0), RewardTerm("long", 0.5))
    judged = judge(rewards=terms)(session, rollout, ("logprobs",))
    scores = [call for kind, call in session.server.calls if kind == "score"]
    assert scores == [{"rewards": {"good": -2.0, "long": 0.5}, "outputs": ("logprobs", "rewards"), "append_eos": True}]
    np.testing.assert_allclose(judged.rewards, -2.0 * judged.raw["good"] + 0.5 * judged.raw["long"])
    assert judged.raw["long"].tolist() == [len(completion.tokens) for completion in rollout.completions]
    assert judged.scored[0].logprobs is not None


def test_labels_of_an_adapter_are_terms_of_their_own(session, rollout, monkeypatch):
    monkeypatch.setattr(session, "_reward", lambda name, tokens: 1.0)
    terms = (RewardTerm("good", 2.0, label=0), RewardTerm("good", 0.5, label=3))
    judged = judge(rewards=terms, pooling="last_not_pad")(session, rollout)
    assert list(judged.raw) == ["good[0]", "good[3]"]
    assert judged.rewards.tolist() == [2.5, 2.5]
    assert session.server.pooling == "last_not_pad"


@pytest.mark.parametrize(
    ("declared", "asked"),
    [
        ((None, None), True),
        ((True, None), True),
        ((True, True), None),
        ((False, False), None),
        ((True, False), None),
    ],
)
def test_an_end_of_sequence_is_appended_as_adapters_declare_and_else_as_they_are_trained(
    session, rollout, declared, asked
):
    session.server.declared = dict(zip(("good", "long"), declared, strict=True))
    ask = judge(rewards=(RewardTerm("good"), RewardTerm("long")))
    ask(session, rollout)
    ask(session, rollout)
    assert [call["append_eos"] for kind, call in session.server.calls if kind == "score"] == [asked, asked]


def test_what_is_configured_goes_before_what_adapters_declare(session, rollout):
    session.server.declared = {"good": False}
    judge(rewards=(RewardTerm("good"),), append_eos=True)(session, rollout)
    assert session.server.calls[-1][1]["append_eos"] is True


def test_adapters_of_which_one_refuses_an_end_of_sequence_and_one_is_silent_have_to_be_told(session, rollout):
    session.server.declared = {"good": False, "long": None}
    with pytest.raises(ConfigError, match=r"append_eos: is not set, 'good' wants no .* --reward-append-eos long=yes"):
        judge(rewards=(RewardTerm("good"), RewardTerm("long")))(session, rollout)


def test_a_function_is_added_with_its_weight(session, rollout, source):
    settings = {"reward_function": f"{source}:lengths", "reward_function_weight": 10.0}
    judged = judge(rewards=(RewardTerm("long"),), **settings)(session, rollout)
    lengths = np.array([len(text) for text in rollout.texts])
    np.testing.assert_allclose(judged.raw["reward_function"], lengths)
    np.testing.assert_allclose(judged.rewards, judged.raw["long"] + 10.0 * lengths)


def test_a_function_alone_asks_the_server_for_no_reward(session, rollout, source):
    alone = judge(reward_function=f"{source}:labels")
    assert alone(session, rollout).rewards.tolist() == [5.0, 7.0]
    assert "score" not in [kind for kind, _ in session.server.calls]
    alone(session, rollout, ("values",))
    assert session.server.calls[-1] == ("score", {"rewards": None, "outputs": ("values",), "append_eos": None})


def test_a_function_gets_the_columns_that_it_names_or_all(session, rollout, source):
    assert judge(reward_function=f"{source}:labels")(session, rollout).rewards.tolist() == [5.0, 7.0]
    assert judge(reward_function=f"{source}:everything")(session, rollout).rewards.tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "reward_function: gave 1 rewards for 2 completions"),
        ("words", "reward_function: must return a list of numbers"),
        ("nothing", "reward_function: must return a list of numbers"),
        ("broken", "reward_function: gave nan for the completion"),
    ],
)
def test_rewards_that_are_none_are_refused(session, rollout, source, name, message):
    with pytest.raises(ConfigError, match=message):
        judge(reward_function=f"{source}:{name}")(session, rollout)


def test_an_error_inside_the_function_is_its_own(session, rollout, source):
    with pytest.raises(TypeError, match="a bug of its own"):
        judge(reward_function=f"{source}:raising")(session, rollout)


def test_a_function_of_a_module_is_imported():
    assert load_function("json:dumps")({}) == "{}"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("json", "'json' is neither module:function nor path/to/file.py:function"),
        (":dumps", "is neither"),
        ("json:nope", "json has no function 'nope'"),
        ("nosuchmodule:f", "no module 'nosuchmodule'"),
        ("nosuch.py:f", "nosuch.py is not there"),
        ("{source}:number", "has no function 'number'"),
    ],
)
def test_functions_that_are_not_there_are_named(source, spec, message):
    with pytest.raises(ConfigError) as refused:
        load_function(spec.format(source=source))
    assert str(refused.value).startswith("reward_function: ")
    assert message in str(refused.value)
