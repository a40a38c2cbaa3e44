import json

import grpc
import pytest
from client.wire import Failure


def objects(text):
    return [json.loads(line) for line in text.splitlines()]


# -------------------------------------------------------------------------------------------------------- ranking


def test_responses_are_ranked_best_first(run):
    shown = run("reward", "The film was", "short", "a longer one", "mid-size")

    assert shown.code == 0
    assert "The film was" in shown.out
    rows = [line.split("│")[1:4] for line in shown.out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["1", "+12.0000", "a longer one"],
        ["2", "+8.0000", "mid-size"],
        ["3", "+5.0000", "short"],
    ]


def test_several_adapters_are_ranked_by_their_mean(run, server):
    shown = run("reward", "p", "abc", "abcdef", "-a", "x", "--adapter", "y", "--json")

    assert objects(shown.out) == [
        {"rank": 1, "prompt": "p", "response": "abcdef", "score": 56.0, "scores": {"x": 6.0, "y": 106.0}},
        {"rank": 2, "prompt": "p", "response": "abc", "score": 53.0, "scores": {"x": 3.0, "y": 103.0}},
    ]
    assert len(server.requests["Reward"]) == 1
    table = run("reward", "p", "abc", "-a", "x", "-a", "y").out
    assert "mean" in table
    assert "+53.0000" in table


def test_what_looks_like_markup_is_shown_as_it_is(run):
    shown = run("reward", "[bold]p[/bold]", "[red]a[/red] [x]")

    assert "[bold]p[/bold]" in shown.out
    assert "[red]a[/red] [x]" in shown.out


@pytest.mark.parametrize("args", [["only a prompt"], ["p", "r", "--repl"]])
def test_arguments_that_do_not_fit_are_wrong_usage(run, server, args):
    shown = run("reward", *args)

    assert shown.code == 2
    assert not server.requests["Reward"]


# ----------------------------------------------------------------------------------------------------------- pipes


def test_lines_with_a_tab_are_answered_in_kind(run):
    shown = run("reward", stdin="The film was\t good.\nIt\tis\there\r\n")

    assert (shown.code, shown.out) == (0, "6\tThe film was\t good.\n7\tIt\tis\there\n")


def test_json_lines_are_answered_in_kind_and_keep_what_else_they_hold(run):
    shown = run("reward", stdin='{"id": 7, "prompt": "p\\n", "response": "ä\\tb", "score": null}\n\n')

    assert objects(shown.out) == [
        {"id": 7, "prompt": "p\n", "response": "ä\tb", "score": 3.0, "scores": {"helpful": 3.0}}
    ]
    assert "ä" in shown.out


def test_lines_can_be_answered_with_json_always(run):
    assert objects(run("reward", "--json", stdin="p\tab").out) == [
        {"prompt": "p", "response": "ab", "score": 2.0, "scores": {"helpful": 2.0}}
    ]


def test_a_label_of_an_adapter_is_asked_for_by_its_number(run, server):
    shown = run("reward", "-a", "x[2]", "-a", "x[0]", "--json", stdin="p\tab\n")

    assert objects(shown.out)[0]["scores"] == {"x[2]": 2.0, "x[0]": 102.0}
    (request,) = server.requests["Reward"]
    assert [(term.adapter, term.label) for term in request.rewards] == [("x", 2), ("x", 0)]


def test_several_adapters_each_have_their_column(run):
    assert run("reward", "-a", "x", "-a", "y", stdin="p\tab\n").out == "2\t102\tp\tab\n"


def test_many_lines_go_in_few_calls_and_keep_their_order(run, server):
    shown = run("reward", stdin="".join(f"p\t{'x' * size}\n" for size in range(1, 101)))

    assert [line.split("\t")[0] for line in shown.out.splitlines()] == [str(size) for size in range(1, 101)]
    assert [len(request.sequences) for request in server.requests["Reward"]] == [32, 32, 32, 4]


def test_no_lines_are_no_error(run, server):
    assert run("reward", stdin="").code == 0
    assert not server.requests["Reward"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"no tab", "line 2 is neither prompt TAB response nor"),
        (b"{not json\tat all", "line 2 is not JSON"),
        (b'{"prompt": "p"}', 'line 2 has no text "response"'),
        (b'{"prompt": 3, "response": "r"}', 'line 2 has no text "prompt"'),
        (b"\xff\tr", "line 2 is not UTF-8"),
    ],
)
def test_a_bad_line_is_named_after_the_lines_before_it_are_answered(run, line, complaint):
    shown = run("reward", stdin=b"p\tgood\n" + line + b"\np\tnever\n")

    assert (shown.code, shown.out) == (1, "4\tp\tgood\n")
    assert complaint in shown.err
    assert shown.err.count("\n") == 1


def test_a_line_that_the_server_refuses_is_named_too(run, server):
    refused = Failure(grpc.StatusCode.INVALID_ARGUMENT, "too long", "TOO_LONG", "sequences[1]")
    alone = Failure(grpc.StatusCode.INVALID_ARGUMENT, "too long", "TOO_LONG", "sequences[0]")
    server.fail("Reward", refused, None, alone)  # the batch; then line 1 alone passes, and line 3 does not

    shown = run("reward", stdin="p\ta\n\np\tbb\np\tccc\n")

    assert (shown.code, shown.out) == (1, "1\tp\ta\n")
    assert shown.err == "error: line 3: too long\n"


# ------------------------------------------------------------------------------------------------------------ repl


def test_a_conversation_through_a_pipe(run):
    shown = run("reward", "--repl", stdin="first\nabc\nabcdef\nab\n\nsecond\nxyz\nquit\nnever\n")

    assert shown.code == 0
    assert shown.out.splitlines() == [
        "helpful +3.0000  (number 1 of 1)",
        "helpful +6.0000  (number 1 of 2)",
        "helpful +2.0000  (number 3 of 3)",
        "helpful +3.0000  (number 1 of 1)",
    ]


def test_a_conversation_in_json_knows_its_prompts(run, server):
    shown = run("reward", "given", "--repl", "--json", stdin="a\n\nasked\nbb\n")

    assert [(o["prompt"], o["response"], o["score"]) for o in objects(shown.out)] == [
        ("given", "a", 1.0),
        ("asked", "bb", 2.0),
    ]


def test_a_refusal_does_not_end_a_conversation(run, server):
    server.fail("Reward", Failure(grpc.StatusCode.INVALID_ARGUMENT, "too long"))

    shown = run("reward", "p", "--repl", stdin="aaa\nbb\n")

    assert shown.code == 0
    assert shown.err == "error: too long\n"
    assert shown.out == "helpful +2.0000  (number 1 of 1)\n"
