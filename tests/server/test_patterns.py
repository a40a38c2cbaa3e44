"""Patterns of module names: what they match is what `re` says, and none takes long."""

from __future__ import annotations

import contextlib
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from onebase.server.patterns import MAX_LENGTH, Budget, Pattern, PatternError, assigned, check, matching

NAMES = [
    f"model.layers.{layer}.{part}"
    for layer in range(12)
    for part in ("self_attn", "self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.experts.3.up_proj", "norm")
] + ["model", "model.embed_tokens", "lm_head", "model.visual.blocks.0.attn.qkv", "q_proj"]

UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
    r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:k_proj|v_proj|q_proj|o_proj|gate_proj)))"
)
USUAL = [
    r".*\.(q|k|v|o)_proj$",
    r"model\.layers\.\d+\.self_attn\.q_proj",
    r"model.layers.\d+.self_attn.q_proj",
    r"^model\.layers\.[01]\.(self_attn|mlp)\.(q|gate)_proj$",
    r".*self_attn.*",
    r".*\.layers\.([0-9]|1[0-1])\..*_proj",
    r"model\.layers\.(?:[2-9]|10)\.mlp\.experts\.\d{1,3}\.(gate|up|down)_proj",
    r"[^.]+\.layers\.\d+\.mlp\.[a-z]+_proj",
    r"(.*\.)?q_proj",
    r".*[qo]_proj",
    r"",
    UNSLOTH,
]  # fmt: skip


@pytest.mark.parametrize("pattern", USUAL)
def test_the_usual_patterns_match_what_re_matches(pattern):
    assert matching(pattern, NAMES) == [name for name in NAMES if re.fullmatch(pattern, name)]


@pytest.mark.parametrize(
    "keys",
    [("q_proj",), ("self_attn.q_proj", "q_proj"), (r"^q_proj", r"q_proj"), (r"layers\.\d.*q_proj", "o_proj"),
     (r"^model\.layers\.[01]\.mlp.*", "up_proj", r".*"), ("a|q_proj", "o_proj"), ("-x", "mlp.gate_proj")],
)  # fmt: skip
def test_keys_are_given_to_names_as_peft_gives_them(keys):
    values = {key: number for number, key in enumerate(keys)}
    wanted = {name: values[key] for name in NAMES if (key := get_pattern_key(list(keys), name)) in values}
    assert assigned(values, NAMES) == wanted


@pytest.mark.parametrize(
    "pattern",
    [r"(?=a)b", r"(?!.*visual).*", r"(?<=a)b", r"(a)\1", r"(?P<x>a)", r"(?i)a", r"a\x41", "(" * 30 + ")" * 30,
     r"((a{1,999}){1,999}){1,999}", "a" * (MAX_LENGTH + 50), r"a{5000}", r"^*", r"a**", "[", "(", "a{2}{3}", r"\p{L}"],
)  # fmt: skip
def test_what_is_not_regular_or_too_large_is_refused_with_the_way_out(pattern):
    with pytest.raises(PatternError) as told:
        check(pattern)
    assert "instead" in str(told.value) or "list the modules" in str(told.value) or "no regular" in str(told.value)


HOSTILE = [
    r"(a+)+$", r"(a|a)*b", r"(a|aa)+$", r"(.*)*x", r"(.*.*)*x", r"((a*)*)*x", "(.|.)" * 40 + "Z", r".*.*.*.*.*.*.*Z",
    "(a?){200}a{200}", r"(\w+\s?)*$", "(x+x+)+y", "a?" * 100 + "a" * 100, r"([a-z]+)*\d", r"(.{1,30}){1,30}!",
]  # fmt: skip
LONG = ["a" * 60, "x" * 100, "model." + "a" * 200, ".".join("ab" * 10 for _ in range(10))] * 50


@pytest.mark.parametrize("pattern", HOSTILE)
def test_a_hostile_pattern_takes_no_time_or_is_refused(pattern):
    began = time.process_time()
    for resolve in (matching, lambda one, names: assigned({one: 1, f"{one}|": 2}, names)):
        with contextlib.suppress(PatternError):
            resolve(pattern, [*LONG, *NAMES])
    assert time.process_time() - began < 5


def test_the_budget_is_for_all_names_together():
    pattern = Pattern("(a|b)*c", Budget(500))
    assert pattern.fullmatch("abac")
    with pytest.raises(PatternError, match="too long"):
        any(pattern.fullmatch(f"{number:08b}".replace("0", "a").replace("1", "b")) for number in range(100))


def nodes():
    atoms = st.sampled_from(["a", "b", ".", r"\.", r"\d", "[ab]", "[^a]", r"\w", "[a-c.]", "_", r"\b", "^", "$", "1"])
    quantified = ["*", "+", "?", "{2}", "{1,3}", "{,2}", "{2,}", "*?", "+?", "??"]

    def grow(inner):
        return (
            st.tuples(inner, inner).map("".join)
            | st.tuples(inner, inner).map("|".join)
            | st.tuples(inner.map("(?:{})".format), st.sampled_from(quantified)).map("".join)
            | inner.map("({})".format)
        )

    return st.recursive(atoms, grow, max_leaves=8)


@settings(max_examples=500, deadline=None)
@given(pattern=nodes(), names=st.lists(st.text("ab1._", max_size=8), max_size=8))
def test_any_regular_pattern_matches_what_re_matches(pattern, names):
    assert matching(pattern, names) == [name for name in names if re.fullmatch(pattern, name)]


@settings(max_examples=60, deadline=None)
@given(pattern=nodes(), times=st.integers(1, 60), name=st.text("ab1.", min_size=1, max_size=4))
def test_nothing_that_is_taken_takes_long(pattern, times, name):
    began = time.process_time()
    for hostile in (pattern * times, f"(?:{pattern})*" * min(times, 20) + "Z", f"(?:(?:{pattern})+)+Z"):
        with contextlib.suppress(PatternError):
            matching(hostile, [name * 40, "a" * 100])
    assert time.process_time() - began < 8
