"""PEFT's LoraConfig as the server's LoraSpec."""

import pytest
from peft import LoraConfig

from onebase.client.trl.lora import lora_spec


def test_a_config_of_trls_documentation():
    spec = lora_spec(LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM"))
    assert (spec.rank, spec.alpha, spec.target_modules) == (16, 32.0, ("peft-default",))


def test_every_field_that_makes_a_difference():
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["v_proj", "q_proj"],
        use_rslora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 3},
    )
    spec = lora_spec(config)
    assert spec.target_modules == ("q_proj", "v_proj")
    assert (spec.use_rslora, spec.rank_pattern, spec.alpha_pattern) == (True, {"q_proj": 2}, {"v_proj": 3.0})
    assert lora_spec({"r": 4, "target_modules": "all-linear"}).target_modules == ("all-linear",)


@pytest.mark.parametrize(
    ("name", "value"), [("use_dora", True), ("bias", "all"), ("modules_to_save", ["lm_head"]), ("peft_type", "IA3")]
)
def test_what_is_not_trained_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name if name != "peft_type" else "IA3"):
        lora_spec({"r": 4, name: value})
