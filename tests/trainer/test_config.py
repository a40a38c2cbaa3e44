"""The settings of a run: defaults, checks, files and flags."""

import dataclasses

import pytest

from onebase.trainer.commands import EXAMPLE
from onebase.trainer.config import RewardTerm, TrainConfig
from onebase.trainer.hyperparameters import GrpoConfig, PpoConfig, RlooConfig
from onebase.trainer.loading import load_config
from onebase.trainer.parsing import ConfigError, split_arguments

MINIMAL = "prompts: {path: p.jsonl}\nrewards: [{adapter: sentiment}]\n"


@pytest.fixture(autouse=True)
def no_server_in_the_environment(monkeypatch):
    monkeypatch.delenv("ONEBASE_SERVER", raising=False)


@pytest.fixture
def config_file(tmp_path):
    def write(text):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return path

    return write


def test_ppo_has_the_names_and_the_defaults_of_trl():
    assert dataclasses.asdict(PpoConfig()) == {
        "learning_rate": 1.41e-5,
        "adap_kl_ctrl": True,
        "init_kl_coef": 0.2,
        "kl_penalty": "kl",
        "target": 6.0,
        "horizon": 10000.0,
        "gamma": 1.0,
        "lam": 0.95,
        "cliprange": 0.2,
        "cliprange_value": 0.2,
        "vf_coef": 0.1,
        "batch_size": 128,
        "mini_batch_size": 128,
        "gradient_accumulation_steps": 1,
        "ppo_epochs": 4,
        "max_grad_norm": None,
        "early_stopping": False,
        "target_kl": 1.0,
        "ratio_threshold": 10.0,
        "use_score_scaling": False,
        "use_score_norm": False,
        "score_clip": None,
        "whiten_rewards": False,
    }


def test_the_others_have_the_defaults_of_trl():
    grpo, rloo = GrpoConfig(), RlooConfig()
    assert (grpo.num_generations, grpo.beta, grpo.epsilon, grpo.scale_rewards) == (8, 0.0, 0.2, "group")
    assert (grpo.loss_type, grpo.num_iterations, grpo.learning_rate, grpo.max_grad_norm) == ("dapo", 1, 1e-6, 1.0)
    assert (rloo.num_generations, rloo.beta, rloo.epsilon, rloo.normalize_advantages) == (2, 0.05, 0.2, False)


def test_a_minimal_file_is_enough(config_file):
    config = load_config(config_file(MINIMAL))
    assert config.rewards == (RewardTerm("sentiment", 1.0),)
    assert (config.server, config.reference, config.append_eos) == ("127.0.0.1:7070", "base", None)
    assert config.output_path.parts[-2:] == ("runs", "policy_1")
    assert config.run_name == "policy_1"


def test_several_labels_of_one_adapter_may_be_summed(config_file):
    config = load_config(config_file(MINIMAL), [("rewards", "[{adapter: a, label: 1}, {adapter: a, label: 0}]")])
    assert config.rewards == (RewardTerm("a", 1.0, 1), RewardTerm("a", 1.0, 0))


def test_the_example_of_the_help_can_be_used(config_file):
    config = load_config(config_file(EXAMPLE))
    assert config.ppo.learning_rate == 1.41e-5
    assert config.policy.target_modules == ("all-linear",)
    assert config.eval_prompts is not None


def test_flags_win_over_the_file(config_file):
    path, flags = split_arguments(
        [
            "--ppo.learning_rate",
            "1e-4",
            str(config_file(MINIMAL + "steps: 5\n")),
            "--rewards.0.weight",
            "-1",
            "--steps=10",
            "--policy.name",
            "policy_2",
        ]
    )
    config = load_config(path, flags)
    assert config.ppo.learning_rate == 1e-4
    assert config.rewards[0].weight == -1.0
    assert config.steps == 10
    assert config.run_name == "policy_2"


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("ppo.lerning_rate", "1", "ppo.lerning_rate: unknown key; did you mean 'learning_rate'?"),
        ("ppo.kl_penalty", "full", "ppo.kl_penalty: 'full' is not supported"),
        ("ppo.kl_penalty", "max", "ppo.kl_penalty: 'max' is not one of kl, abs, mse"),
        ("ppo.batch_size", "100", "ppo.batch_size: 100 is not a multiple of mini_batch_size"),
        ("ppo.mini_batch_size", "0", "ppo.mini_batch_size: 0 is not 1 or more"),
        ("ppo.learning_rate", ".nan", "ppo.learning_rate: nan is not 0 or more"),
        ("ppo.gamma", "1.5", "ppo.gamma: 1.5 is not in"),
        ("ppo.target", "0", "ppo.target: 0.0 is not above 0"),
        ("ppo.score_clip", "-1", "ppo.score_clip: -1.0 is not above 0"),
        ("ppo.max_grad_norm", "0", "ppo.max_grad_norm: 0.0 is not above 0"),
        ("algorithm", "gpro", "algorithm: 'gpro' is not one of ppo, grpo, rloo, reinforce_pp, sft, dpo"),
        ("grpo.num_generations", "1", "grpo.num_generations: 1 is not 2 or more"),
        ("grpo.num_generations", "7", "grpo.num_generations: 7 does not divide batch_size = 128"),
        ("grpo.scale_rewards", "all", "grpo.scale_rewards: 'all' is not one of group, batch, none"),
        ("grpo.loss_type", "ppo", "grpo.loss_type: 'ppo' is not one of grpo, bnpo, dr_grpo, dapo"),
        ("grpo.epsilon", "0", "grpo.epsilon: 0.0 is not above 0"),
        ("grpo.beta", "-1", "grpo.beta: -1.0 is not 0 or more"),
        ("grpo.gradient_accumulation_steps", "0", "grpo.gradient_accumulation_steps: 0 is not 1 or more"),
        ("rloo.num_generations", "3", "rloo.num_generations: 3 does not divide batch_size = 128"),
        ("rloo.num_iterations", "0", "rloo.num_iterations: 0 is not 1 or more"),
        ("reinforce_pp.gamma", "2", "reinforce_pp.gamma: 2.0 is not in"),
        ("reinforce_pp.score_clip", "0", "reinforce_pp.score_clip: 0.0 is not above 0"),
        ("sft.epochs", "0", "sft.epochs: 0 is not 1 or more"),
        ("sft.batch_size", "20", "sft.batch_size: 20 is not a multiple of mini_batch_size = 32"),
        ("sft.completion_column", "''", "sft.completion_column: is empty"),
        ("dpo.beta", "0", "dpo.beta: 0.0 is not above 0"),
        ("dpo.label_smoothing", "0.5", "dpo.label_smoothing: 0.5 is not in"),
        ("dpo.rejected_column", "''", "dpo.rejected_column: is empty"),
        ("dpo.epochs", "0", "dpo.epochs: 0 is not 1 or more"),
        ("sft.num_generations", "2", "sft.num_generations: unknown key"),
        ("policy.rank", "0", "policy.rank: 0 is not 1 or more"),
        ("policy.name", "base", "policy.name: 'base' is the base model"),
        ("generation.temperature", "0", "generation.temperature: 0.0 is not above 0"),
        ("generation.top_p", "0", "generation.top_p: 0.0 is not in"),
        ("generation.min_p", "1", "generation.min_p: 1.0 is not in"),
        ("generation.min_new_tokens", "99", "generation.min_new_tokens: 99 is more than max_new_tokens = 32"),
        ("rewards", "[]", "rewards: is empty and there is no reward_function"),
        ("rewards", "[{adapter: a}, {adapter: a}]", "rewards: 'a' is named 2 times"),
        ("rewards", "[{adapter: a, label: 1}, {adapter: a, label: 1}]", "rewards: 'a[1]' is named 2 times"),
        ("rewards", "[{adapter: a, label: -1}]", "rewards.0.label: -1 is not 0 or more"),
        ("pooling", "first", "pooling: 'first' is not one of last_token, last_not_pad"),
        ("rewards.0.weight", ".inf", "rewards.0.weight: inf is not a finite number"),
        ("prompts.path", "''", "prompts.path: is empty"),
        ("resume", "yes please", "resume: 'yes please' is not one of auto, never, must"),
        ("steps", "-1", "steps: -1 is not 0 or more"),
        ("steps", "[", "steps: is not YAML"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_by_name(config_file, flag, value, message):
    with pytest.raises(ConfigError) as refused:
        load_config(config_file(MINIMAL), [(flag, value)])
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "prompts: is required"),
        ("- 1", "must be a mapping of settings"),
        ("a: [", "is not YAML"),
        ("prompts: {}", "prompts.path: is required"),
    ],
)
def test_files_that_cannot_be_used_are_refused(config_file, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config_file(text))


def test_the_environment_names_the_server_where_nothing_else_does(config_file, monkeypatch):
    monkeypatch.setenv("ONEBASE_SERVER", "elsewhere:1")
    assert load_config(config_file(MINIMAL)).server == "elsewhere:1"
    assert load_config(config_file(MINIMAL + "server: here:2\n")).server == "here:2"
    assert load_config(config_file(MINIMAL), [("server", "there:3")]).server == "there:3"


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "nothing.yaml")


def test_a_setting_made_in_python_is_checked_too():
    with pytest.raises(ConfigError, match="batch_size: 3 is not a multiple"):
        PpoConfig(batch_size=3, mini_batch_size=2)
    with pytest.raises(ConfigError, match="rewards: is empty"):
        TrainConfig(prompts=None)
