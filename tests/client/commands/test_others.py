import json

import pytest

from onebase.client.commands.generate_command import write_live
from onebase.client.types import AdapterVersion, CompletionChunk

# --------------------------------------------------------------------------------------------------------- generate


def test_text_goes_to_stdout_and_the_rest_to_stderr(run, server):
    shown = run("generate", "ab", "--adapter", "policy_1", "-m", "4", "--seed", "9")

    assert (shown.code, shown.out) == (0, "abab\n")
    assert shown.err == "policy_1 version 7: 4 tokens, length, seed 9\n"


def test_every_flag_reaches_the_server(run, server):
    run(
        *["generate", "ab", "-a", "p", "-m", "2", "-n", "3", "-t", "0.5", "--top-k", "4", "--top-p", "0.25"],
        *["--min-p", "0.125", "--stop", "x", "--stop", "y", "--seed", "6", "--min-new-tokens", "1", "--ignore-eos"],
    )

    (request,) = server.requests["Generate"]
    sampling = request.sampling
    assert (request.adapter, [prompt.text for prompt in request.prompts]) == ("p", ["ab"])
    assert (sampling.max_new_tokens, sampling.n, sampling.temperature, sampling.top_k) == (2, 3, 0.5, 4)
    assert (sampling.top_p, sampling.min_p, list(sampling.stop), sampling.seed) == (0.25, 0.125, ["x", "y"], 6)
    assert (sampling.min_new_tokens, sampling.ignore_eos) == (1, True)


def test_the_bare_base_writes_where_no_policy_is_named_with_a_seed_of_the_servers(run, server):
    run("generate", "ab")

    (request,) = server.requests["Generate"]
    assert request.adapter == "base"
    assert not request.sampling.HasField("seed")


def test_completions_as_json(run):
    shown = run("generate", "ab", "-a", "policy_1", "-n", "2", "-m", "2", "--json")

    assert [json.loads(line) for line in shown.out.splitlines()] == [
        {
            "prompt": "ab",
            "completion_index": index,
            "text": "ab",
            "tokens": [100 * index, 100 * index + 1],
            "finish_reason": "length",
            "adapter": "policy_1",
            "version": 7,
            "seed": 0,
        }
        for index in range(2)
    ]


def test_completions_that_interleave_are_written_one_after_the_other_and_the_first_at_once(capsys):
    def chunk(index, text, reason=None):
        return CompletionChunk(0, index, text, [1], None, None, reason, AdapterVersion("a", 1), 5, 2)

    written = []

    def drawn():
        for piece in (
            chunk(0, "a"), chunk(2, "x"), chunk(1, "m", "eos"), chunk(0, "b", "length"), chunk(2, "y", "eos"),
        ):  # fmt: skip
            yield piece
            written.append(capsys.readouterr().out)

    write_live(drawn())

    assert written == ["a", "", "", "b\nm\nx", "y\n"]


# --------------------------------------------------------------------------------------------------------- adapters


@pytest.fixture
def two(run):
    run("adapters", "load", "helpful", "there/helpful", "--kind", "reward")
    run("adapters", "load", "policy_1", "there/policy_1", "--value-head", "--replace", "--with-optimizer")


@pytest.mark.usefixtures("two")
def test_adapters_are_loaded_and_listed(run, server):
    reward, policy = server.requests["LoadAdapter"]
    assert (reward.name, reward.path, reward.kind, reward.replace) == ("helpful", "there/helpful", 2, False)
    assert (policy.kind, policy.value_head, policy.replace, policy.with_optimizer) == (1, True, True, True)

    shown = run("adapters")
    rows = [[cell.strip() for cell in line.split("│")] for line in shown.out.splitlines() if line.startswith("│")]
    assert [row[1:5] + row[6:8] for row in rows] == [
        ["helpful", "reward", "score", "7", "375.0k", "1.4 MiB"],
        ["policy_1", "policy", "value", "7", "375.0k", "1.4 MiB"],
    ]
    listed = [json.loads(line) for line in run("adapters", "--json").out.splitlines()]
    assert [(adapter["name"], adapter["kind"], adapter["total_bytes"]) for adapter in listed] == [
        ("helpful", "reward", 1_501_000),
        ("policy_1", "policy", 1_501_000),
    ]


@pytest.mark.parametrize(
    ("flags", "declared", "listed"),
    [
        ((), (None, 0), "score"),
        (("--append-eos",), (True, 0), "score, eos"),
        (("--no-append-eos", "--pooling", "last_not_pad"), (False, 2), "score, no eos, not pad"),
        (("--pooling", "last_token"), (None, 1), "score"),
    ],
)
def test_how_a_reward_reads_is_declared_and_listed(run, server, flags, declared, listed):
    assert run("adapters", "load", "r", "there", "--kind", "reward", *flags).code == 0

    (request,) = server.requests["LoadAdapter"]
    assert (request.append_eos if request.HasField("append_eos") else None, request.pooling) == declared
    assert f"│ {listed} │" in " ".join(run("adapters").out.split())


def test_a_pooling_rule_that_is_none_is_wrong_usage(run, server):
    assert run("adapters", "load", "a", "b", "--kind", "reward", "--pooling", "mean").code == 2
    assert not server.requests["LoadAdapter"]


@pytest.mark.usefixtures("two")
def test_an_adapter_is_saved(run, server):
    shown = run("adapters", "save", "policy_1", "out", "--with-optimizer", "--overwrite")

    assert shown.out == "saved policy_1 version 7 to /adapters/out, 1.4 MiB\n"
    (request,) = server.requests["SaveAdapter"]
    assert (request.with_optimizer, request.overwrite) == (True, True)


@pytest.mark.usefixtures("two")
def test_deleting_asks_first(run, server):
    assert run("adapters", "delete", "policy_1", stdin="n\n").code == 1
    assert run("adapters", "delete", "policy_1", stdin="").code == 1
    assert not server.requests["DeleteAdapter"]

    assert run("adapters", "delete", "policy_1", stdin="y\n").code == 0
    assert run("adapters", "delete", "helpful", "--yes").out == "deleted helpful\n"
    assert server.adapters == {}


def test_an_adapter_that_is_not_there_is_told(run):
    shown = run("adapters", "save", "nobody", "out")

    assert (shown.code, shown.err) == (1, "error: no adapter 'nobody' (ADAPTER_NOT_FOUND, field name)\n")


def test_a_kind_that_is_none_is_wrong_usage(run, server):
    assert run("adapters", "load", "a", "b", "--kind", "judge").code == 2
    assert not server.requests["LoadAdapter"]


def test_the_server_may_be_named_before_or_after_the_subcommand(run, server, monkeypatch):
    monkeypatch.delenv("ONEBASE_SERVER")

    assert run("adapters", "--server", server.target, "load", "a", "b").code == 0
    assert run("adapters", "load", "a", "b", "--server", server.target).code == 0
    assert len(server.requests["LoadAdapter"]) == 2


# ----------------------------------------------------------------------------------------------------------- status


def test_status_shows_sessions_adapters_queues_and_speed(run, client):
    client.create_adapter("policy_1")
    with client.open_session("policy_1", label="train [policy_1]"):
        shown = run("status")

    for part in (
        "onebase 9.9", "fake/base", "1 h 2 min", "3.0 GiB resident", "base 2.0 MiB", "1,234.5 generated",
        "sessions: 1", "train [policy_1]", "adapters: 1", "375.0k", "train", "4",
    ):  # fmt: skip
        assert part in shown.out, part


def test_status_as_json(run, client):
    client.create_adapter("policy_1")

    (line,) = run("status", "--json").out.splitlines()

    told = json.loads(line)
    assert (told["version"], told["base"]["model"]) == ("9.9", "fake/base")
    assert told["adapters"][0]["name"] == "policy_1"
    assert told["queues"] == [{"work": "train", "waiting": 4, "running": 1}]
