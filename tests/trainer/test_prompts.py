"""Prompts: read from files through `datasets`, and handed out in a seeded order."""

import json

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase.trainer.config import PromptsConfig
from onebase.trainer.parsing import ConfigError
from onebase.trainer.prompts import PromptOrder, PromptRow, load_prompts

ROWS = [{"prompt": "The film", "label": 1}, {"prompt": "I, for one,", "label": 0}]


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    """The user's cache cannot be written: what is local must not need it."""
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(nowhere / "cache"))


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_jsonl(tmp_path):
    rows = load_prompts(PromptsConfig(write_jsonl(tmp_path / "p.jsonl")))
    assert rows == (PromptRow("The film", {"label": 1}), PromptRow("I, for one,", {"label": 0}))


def test_a_line_is_a_line_whatever_its_text_holds(tmp_path):
    rows = [{"prompt": "one\u2028two\r"}, {"prompt": "Zoë 🎉", "topic": "x"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    read = load_prompts(PromptsConfig(str(tmp_path / "p.jsonl")))
    assert [row.prompt for row in read] == [row["prompt"] for row in rows]
    assert [row.columns for row in read] == [{"topic": None}, {"topic": "x"}]


def test_csv_with_another_column(tmp_path):
    (tmp_path / "p.csv").write_text('text,label\n"The film",1\n"I, for one,",0\n')
    rows = load_prompts(PromptsConfig(str(tmp_path / "p.csv"), column="text"))
    assert [row.prompt for row in rows] == ["The film", "I, for one,"]
    assert [row.columns for row in rows] == [{"label": 1}, {"label": 0}]


def test_parquet(tmp_path):
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "p.parquet"))
    assert [row.prompt for row in load_prompts(PromptsConfig(str(tmp_path / "p.parquet")))] == [
        "The film",
        "I, for one,",
    ]


def test_a_directory_of_files_has_splits(tmp_path):
    write_jsonl(tmp_path / "train.jsonl")
    write_jsonl(tmp_path / "test.jsonl", ROWS[:1])
    assert len(load_prompts(PromptsConfig(str(tmp_path)))) == 2
    assert len(load_prompts(PromptsConfig(str(tmp_path), split="test"))) == 1


def test_directories_that_datasets_saved(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "many"))
    assert len(load_prompts(PromptsConfig(str(tmp_path / "one")))) == 2
    assert len(load_prompts(PromptsConfig(str(tmp_path / "many"), split="test"))) == 2
    with pytest.raises(ConfigError, match=r"prompts\.path: .*train"):
        load_prompts(PromptsConfig(str(tmp_path / "many")))


def test_token_ids_are_prompts_too_and_can_be_cut(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": [1, 2, 3]}, {"prompt": [4]}])
    assert [row.prompt for row in load_prompts(PromptsConfig(path))] == [[1, 2, 3], [4]]
    assert [row.prompt for row in load_prompts(PromptsConfig(path, max_tokens=2))] == [[1, 2], [4]]


def test_a_file_that_changed_is_read_anew(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl")
    load_prompts(PromptsConfig(path))
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "new"}])
    assert [row.prompt for row in load_prompts(PromptsConfig(path))] == ["new"]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (ROWS, {"column": "promt"}, "eval_prompts.column: no column 'promt'; there are prompt, label"),
        ([{"prompt": "a"}, {"prompt": ""}], {}, "eval_prompts.path: row 1 holds ''"),
        ([{"prompt": "a"}, {"prompt": None}], {}, "eval_prompts.path: row 1 holds None"),
        ([{"prompt": [1.5]}], {}, "eval_prompts.path: row 0 holds [1.5]"),
        (ROWS, {"max_tokens": 3}, "eval_prompts.max_tokens: cuts prompts given as token ids only"),
    ],
)
def test_rows_that_are_no_prompts_are_refused(tmp_path, rows, settings, message):
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    with pytest.raises(ConfigError) as refused:
        load_prompts(PromptsConfig(path, **settings), "eval_prompts")
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", None, "is not there"),
        ("p.txt", "hello", "ends in none of .jsonl, .json, .csv, .parquet"),
        ("p.csv", "prompt\n", "no data"),
        ("p.jsonl", "", "holds no rows"),
        ("p.jsonl", '{"prompt": "a"}\n\n{not json', "line 3, cannot be read"),
        ("p.jsonl", '["a"]', "line 1, is no JSON object"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as refused:
        load_prompts(PromptsConfig(str(path)))
    assert message in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_data_set_without_rows_is_refused(tmp_path):
    datasets.Dataset.from_dict({"prompt": []}).save_to_disk(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"prompts\.path: .*holds no rows"):
        load_prompts(PromptsConfig(str(tmp_path / "empty")))


@given(st.integers(1, 7), st.integers(0, 50), st.integers(1, 20), st.integers(0, 5))
def test_the_order_depends_on_seed_and_position_alone_and_every_pass_has_every_row(size, position, count, seed):
    rows = [PromptRow(str(i), {}) for i in range(size)]
    whole = PromptOrder(rows, seed).take(0, 80)
    assert PromptOrder(rows, seed).take(position, count) == whole[position : position + count]
    for start in range(0, 80 - size + 1, size):
        assert sorted(row.prompt for row in whole[start : start + size]) == [str(i) for i in range(size)]


def test_passes_and_seeds_differ_in_order():
    rows = [PromptRow(str(i), {}) for i in range(20)]
    order = PromptOrder(rows, 0)
    assert order.take(0, 20) != order.take(20, 20)
    assert order.take(0, 20) != PromptOrder(rows, 1).take(0, 20)


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 😀"}]


def test_conversations_are_prompts_too(tmp_path):
    rows = [{"prompt": CHAT, "label": 1}, {"prompt": CHAT[1:], "label": 0}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "p.parquet"))
    filled = [{"prompt": [{**CHAT[1], "tool_calls": None}]}]

    for path in (write_jsonl(tmp_path / "p.jsonl", rows), str(tmp_path / "p.parquet")):
        assert load_prompts(PromptsConfig(path)) == (PromptRow(CHAT, {"label": 1}), PromptRow(CHAT[1:], {"label": 0}))
    assert load_prompts(PromptsConfig(write_jsonl(tmp_path / "f.jsonl", filled)))[0].prompt == CHAT[1:]


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "user", "content": 3}, {**CHAT[0], "name": "x"}])
def test_a_message_has_a_role_and_a_content(tmp_path, message):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": CHAT}, {"prompt": [CHAT[0], message]}])
    with pytest.raises(ConfigError, match=r"prompts\.path: message 1 of row 1 is .* both texts"):
        load_prompts(PromptsConfig(path))


def test_conversations_are_not_cut(tmp_path):
    with pytest.raises(ConfigError, match=r"prompts\.max_tokens: .* conversations"):
        load_prompts(PromptsConfig(write_jsonl(tmp_path / "p.jsonl", [{"prompt": CHAT}]), max_tokens=2))
