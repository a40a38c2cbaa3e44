"""Adapters that bring another tokenizer than the base's are refused; what makes no difference is not."""

from __future__ import annotations

import json
import logging
import re
import shutil

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

    assert "it reads 'The film was good, w'… as the ids" in refusal(check, tmp_path)


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
