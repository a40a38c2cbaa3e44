"""Adapters that bring another tokenizer than the base's are refused; what makes no difference is not."""

from __future__ import annotations

import json
import logging
import re
import resource
import shutil

import psutil
import pytest
from engine import tokenizers_made
from engine.conftest import BASE
from transformers import AutoTokenizer

from onebase.server.engine.tokenizer_check import TokenizerCheck
from onebase.server.errors import FailedPrecondition, InvalidArgument
from onebase.server.jobs import AdapterKind, LoadAdapterJob, SaveAdapterJob

CHATML = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"


def refusal(check, path, manifest=None):
    with pytest.raises(FailedPrecondition) as caught:
        check.check(path, manifest or {})
    assert caught.value.reason == "TOKENIZER_MISMATCH"
    assert caught.value.field == "path"
    assert "--tokenizer" in caught.value.message
    return caught.value.message


@pytest.fixture(params=tokenizers_made.ALL)
def make(request):
    return tokenizers_made.ALL[request.param]


@pytest.fixture
def check(make):
    return TokenizerCheck(make())


def test_the_bases_own_tokenizer_passes_and_so_does_none(make, check, tmp_path):
    check.check(tmp_path, {})
    make().save_pretrained(tmp_path)
    check.check(tmp_path, {"tokenizer": check.manifest})
    check.check(tmp_path, {})  # known by now


def test_padding_makes_no_difference(make, check, tmp_path):
    for at, pad in enumerate(("</s>", "[PAD]")):  # TRL takes the first where there is none; people add the second
        tokenizer = make()
        tokenizer.add_special_tokens({"pad_token": pad})
        tokenizer.padding_side = "left"
        tokenizer(["a film", "film"], padding=True, truncation=True, max_length=1)
        tokenizer.save_pretrained(tmp_path / str(at))
        check.check(tmp_path / str(at), {})
        assert TokenizerCheck(tokenizer).manifest == check.manifest


def test_a_token_more_or_less_is_named(make, check, tmp_path):
    more = make()
    more.add_tokens(["<|im_start|>"])
    more.save_pretrained(tmp_path)

    size = len(make())
    said = refusal(check, tmp_path)
    assert f"'<|im_start|>' is its id {size}, and the base's tokenizer has none for it" in said
    assert f"{size + 1} and {size} tokens" in said
    make().save_pretrained(tmp_path / "less")
    assert f"it lacks '<|im_start|>' ({size} and {size + 1} tokens)" in refusal(TokenizerCheck(more), tmp_path / "less")


def test_a_token_with_another_id_is_named(check, make, tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    settings = json.loads(path.read_text())
    vocabulary = settings["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(settings))

    found = re.search(
        r"'([ab])' is its id (\d+), and the base's tokenizer has id (\d+) for it", refusal(check, tmp_path)
    )
    assert found
    assert int(found[2]) == vocabulary[found[1]]


def test_another_end_of_sequence_is_named(check, make, tmp_path):
    other = make()
    other.eos_token = "<unk>"
    other.save_pretrained(tmp_path)

    assert "its end-of-sequence token is '<unk>', and the base's is '</s>'" in refusal(check, tmp_path)


def test_another_reading_of_the_same_vocabulary_is_named(check, make, tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(settings))

    said = refusal(check, tmp_path)
    assert 'its normalizer is {"type": "Lowercase"}, and the base' in said
    assert "in another writing, take them away" in said


def changed(make, tmp_path, change):
    make().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))
    return tmp_path


def test_merges_in_the_older_writing_and_defaults_left_out_make_no_difference(check, make, tmp_path):
    def older(settings):
        settings["model"]["merges"] = [" ".join(pair) for pair in settings["model"]["merges"]]
        del settings["model"]["ignore_merges"], settings["padding"], settings["decoder"]

    check.check(changed(make, tmp_path, older), {})


def test_an_end_of_sequence_behind_a_text_makes_no_difference(check, make, tmp_path):
    def ending(settings):
        after = settings["post_processor"]
        after["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
        after["special_tokens"]["</s>"] = {"id": "</s>", "ids": [1], "tokens": ["</s>"]}

    check.check(changed(make, tmp_path, ending), {})


@pytest.mark.parametrize("part", ["merges", "post_processor", "pre_tokenizer", "added_tokens", "dropout"])
def test_each_part_counts(check, make, tmp_path, part):
    def other(settings):
        if part == "merges":
            settings["model"]["merges"].reverse()
        elif part == "dropout":
            settings["model"]["dropout"] = 0.5
        elif part == "added_tokens":
            settings["added_tokens"].append({**settings["added_tokens"][0], "content": "a"})
            settings["added_tokens"][-1]["id"] = settings["model"]["vocab"]["a"]
        else:
            settings[part] = None if part == "post_processor" else {"type": "Whitespace"}

    refusal(check, changed(make, tmp_path, other))


def test_a_foreign_tokenizer_is_never_run(check, make, tmp_path):
    """Two steps that make 8 GB of a sentence: the library in Rust would end the process."""

    def growing(settings):
        steps = [("T", "e" * 2**17), ("e", "z" * 2**16)]
        settings["normalizer"] = {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": a}, "content": b} for a, b in steps],
        }

    limit = resource.getrlimit(resource.RLIMIT_AS)
    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, limit[1]))  # or a failure would take the machine with it
    try:
        said = refusal(check, changed(make, tmp_path, growing))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert "its normalizer is " in said
    assert len(said) < 2000


@pytest.mark.parametrize("large", ["vocab", "brackets", "tokenizer_config.json", "chat_template.jinja"])
def test_what_is_too_large_to_be_the_bases_is_not_parsed(check, make, tmp_path, large):
    make().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    settings = json.loads(path.read_text())
    if large == "vocab":
        settings["model"]["vocab"] |= {f"zz{i}": 1000 + i for i in range(100_000)}
        path.write_text(json.dumps(settings))
    elif large == "brackets":
        path.write_text(json.dumps(settings)[:-1] + ', "x": [' + "[]," * 100_000 + "0]}")
    else:
        (tmp_path / large).write_text('{"x": "' + "x" * 2**21 + '"}')

    assert "than" in refusal(check, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"model": 5}',
        '{"model": {"vocab": {"a": "b"}}}',
        '{"model": {"vocab": [[1, 2]]}}',
        "[" * 50_000,
        '{"model": {"vocab": {"a": 1}}, "added_tokens": [{"content": [], "id": 1}]}',
        '{"model": {"vocab": {"a": 1}}, "added_tokens": {"content": 5}}',
    ],
    ids=lambda text: text[:60],
)
def test_a_file_of_another_form_is_refused_in_words(check, tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)

    with pytest.raises(InvalidArgument) as caught:
        check.check(tmp_path, {})
    assert caught.value.reason == "BAD_TOKENIZER"


def test_a_manifest_is_enough(check, tmp_path):
    said = refusal(check, tmp_path, {"tokenizer": {"fingerprint": "f", "size": 7, "eos": "</s>"}})

    assert f"size 7 there and {check.manifest['size']} here, eos '</s>' there and '</s>' here" in said
    check.check(tmp_path, {"format": 1})  # of before there was one


def test_a_broken_tokenizer_is_refused_by_its_path(check, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")

    with pytest.raises(InvalidArgument, match=re.escape(str(tmp_path))) as caught:
        check.check(tmp_path, {})
    assert caught.value.reason == "BAD_TOKENIZER"


def test_code_beside_a_tokenizer_is_not_run(check, make, tmp_path):
    make().save_pretrained(tmp_path)
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": [None, "code.Mine"]}}))

    check.check(tmp_path, {})
    assert not (tmp_path / "ran").exists()


def test_another_chat_template_is_a_warning(check, make, tmp_path, caplog):
    tokenizer = make()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path)

    with caplog.at_level(logging.WARNING):
        check.check(tmp_path, {})
        check.check(tmp_path, {})
    assert [record.message for record in caplog.records if "chat template" in record.message]
    assert len(caplog.records) == 1


def test_adapters_are_checked_when_they_are_loaded_and_say_what_they_were_saved_with(run, tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    run(SaveAdapterJob(adapter=1, path=own, overwrite=False, with_optimizer=False))
    manifest = json.loads((own / "onebase.json").read_text())
    assert manifest["tokenizer"] == TokenizerCheck(AutoTokenizer.from_pretrained(BASE)).manifest
    AutoTokenizer.from_pretrained(BASE).save_pretrained(own)
    run(LoadAdapterJob(uid=7, name="a", kind=AdapterKind.POLICY, path=own))

    shutil.copytree(own, other)
    tokenizers_made.byte_level().save_pretrained(other)
    with pytest.raises(FailedPrecondition, match="was trained with another tokenizer"):
        run(LoadAdapterJob(uid=8, name="b", kind=AdapterKind.POLICY, path=other))

    (other / "tokenizer.json").unlink()
    (other / "onebase.json").write_text(json.dumps({**manifest, "tokenizer": {"fingerprint": "f"}}))
    with pytest.raises(FailedPrecondition, match="its manifest names another fingerprint"):
        run(LoadAdapterJob(uid=9, name="c", kind=AdapterKind.POLICY, path=other))
