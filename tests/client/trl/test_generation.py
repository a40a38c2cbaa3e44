"""transformers' keyword arguments mean here what they mean there."""

import pytest
from transformers import GenerationConfig

from onebase.client.trl.generation import read_generation


def read(width=4, **given):
    return read_generation(given, width=width, seed=11)


def test_the_defaults_are_those_of_transformers():
    greedy = read().sampling
    assert (greedy.temperature, greedy.max_new_tokens, greedy.n, greedy.seed) == (0.0, 20 - 4, 1, 11)
    assert not greedy.ignore_eos
    assert read(do_sample=True).sampling.top_k == 50


def test_trls_usual_arguments():
    asked = read(do_sample=True, top_k=0.0, top_p=1.0, min_length=-1, pad_token_id=3, eos_token_id=-1, max_new_tokens=9)
    assert (asked.sampling.top_k, asked.sampling.min_new_tokens, asked.pad_token_id) == (0, 0, 3)
    assert asked.sampling.ignore_eos
    assert asked.sampling.stop_token_ids == ()
    assert asked.sampling.temperature == 1.0


def test_end_of_sequence_ids_are_the_only_ones_that_end_then():
    sampling = read(eos_token_id=[2, 5]).sampling
    assert sampling.ignore_eos
    assert sampling.stop_token_ids == (2, 5)


def test_lengths_count_the_padded_prompt():
    sampling = read(max_length=10, min_length=6).sampling
    assert (sampling.max_new_tokens, sampling.min_new_tokens) == (6, 2)
    with pytest.raises(ValueError, match="max_length=4"):
        read(max_length=4)


def test_a_generation_config_counts_and_arguments_count_more():
    config = GenerationConfig(do_sample=True, temperature=0.5, max_new_tokens=7)
    sampling = read(generation_config=config, max_new_tokens=8).sampling
    assert (sampling.temperature, sampling.max_new_tokens) == (0.5, 8)


@pytest.mark.parametrize(("name", "value"), [("num_beams", 4), ("repetition_penalty", 1.2), ("logits_processor", [1])])
def test_what_the_server_does_not_do_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        read(**{name: value})


def test_what_asks_for_nothing_is_no_obstacle():
    assert read(num_beams=1, repetition_penalty=1.0, return_dict_in_generate=False).sampling.n == 1
