"""`onebase reward --repl`: a conversation with the reward model."""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress

import typer

from onebase.client.commands.judging import Judge, Verdict, number, ranked
from onebase.client.errors import OnebaseError, UnavailableError
from onebase.client.terminal import print_error, print_json, print_note

QUIT = "quit"


def converse(judge: Judge, prompt: str | None, *, as_json: bool) -> None:
    """Asks for a prompt, then for responses to it, until an empty line; ends with "quit" or the end of the input.

    Works as well where the input is a pipe; then nothing is asked aloud.
    """
    if sys.stdin.isatty():
        with suppress(ImportError):  # it gives input() its line editing, where there is such a thing
            importlib.import_module("readline")
        print_note('An empty line begins a new prompt; "quit" or Ctrl-D ends.')
    try:
        while True:
            _judge_responses(judge, prompt or _ask("prompt> "), as_json=as_json)
            prompt = None
    except EOFError:
        return


def _judge_responses(judge: Judge, prompt: str, *, as_json: bool) -> None:
    """Judges responses to a prompt until an empty line."""
    verdicts: list[Verdict] = []
    while prompt and (response := _ask("response> ")):
        try:
            (verdict,) = judge([(prompt, response)])
        except UnavailableError:
            raise
        except OnebaseError as error:  # the next one may do better
            print_error(str(error))
            continue
        verdicts.append(verdict)
        if as_json:
            print_json(verdict.record())
        else:
            rank = ranked(verdicts).index(verdict) + 1
            scores = "  ".join(f"{name} {number(score)}" for name, score in verdict.reward.scores.items())
            typer.echo(f"{scores}  (number {rank} of {len(verdicts)})")


def _ask(question: str) -> str:
    """The next line of the input; EOFError at its end, or if it says to quit."""
    if sys.stdin.isatty():
        line = input(question)
    else:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        line = line.rstrip("\r\n")
    if line.strip() == QUIT:
        raise EOFError
    return line
