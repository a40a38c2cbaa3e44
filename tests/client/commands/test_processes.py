"""The command as a process of its own, with real pipes, a terminal and signals."""

import json
import os
import pty
import signal
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-W", "error", "-c", "from onebase.client.cli import main; main()"]


@pytest.fixture
def start(server):
    """Starts `onebase`, and sees to its end."""
    started = []
    environment = {**os.environ, "ONEBASE_SERVER": server.target, "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}

    def start(*args, **options):
        process = subprocess.Popen([*COMMAND, *args], env=environment, text=True, encoding="utf-8", **options)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def test_a_line_is_answered_before_the_next_one_comes(start):
    process = start("reward", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    for size in (1, 2, 3):
        process.stdin.write(f"The film was\t{'x' * size}\n")
        process.stdin.flush()
        assert process.stdout.readline() == f"{size}\tThe film was\t{'x' * size}\n"
    out, err = process.communicate(timeout=60)

    assert (process.returncode, out, err) == (0, "", "")


def test_a_piped_conversation_is_answered_line_by_line(start):
    process = start("reward", "--repl", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    process.stdin.write("The film was\nfine\n")
    process.stdin.flush()
    assert process.stdout.readline() == "helpful +4.0000  (number 1 of 1)\n"
    out, err = process.communicate("great\nquit\n", timeout=60)

    assert (process.returncode, out, err) == (0, "helpful +5.0000  (number 1 of 2)\n", "")


def test_a_conversation_on_a_terminal_ends_with_ctrl_d(start):
    ours, theirs = pty.openpty()
    process = start("reward", "--repl", stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    with os.fdopen(ours, "r+b", buffering=0) as terminal:
        shown = b""
        for awaited, answer in [(b"prompt> ", b"p\n"), (b"response> ", b"abc\n"), (b"1 of 1)", b""), (b"> ", b"\x04")]:
            while awaited not in shown:
                shown += terminal.read(1000)
            shown = shown.partition(awaited)[2]
            terminal.write(answer)
        assert process.wait(60) == 0


def test_watching_ends_with_ctrl_c_and_status_130(start):
    process = start("status", "--json", "--watch", "0.1", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert [json.loads(process.stdout.readline())["version"] for _ in range(2)] == ["9.9", "9.9"]

    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)

    assert (process.returncode, err) == (130, "")


def test_waiting_for_lines_ends_with_ctrl_c_and_status_130(start):
    process = start("reward", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdin.write("p\tab\n")
    process.stdin.flush()
    assert process.stdout.readline() == "2\tp\tab\n"

    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)

    assert (process.returncode, err) == (130, "")


def test_a_reader_that_has_enough_ends_it_without_a_traceback(start):
    process = start("status", "--json", "--watch", "0.1", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()

    assert process.wait(60) == 1
    assert process.stderr.read() == ""


def test_help_does_not_load_torch():
    program = (
        "import sys\n"
        "from onebase.client.cli import app\n"
        "try:\n"
        "    app(['--help'])\n"
        "except SystemExit as done:\n"
        "    print(done.code, 'torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert out.splitlines()[-1] == "0 False False"
