"""`onebase reward`: ask the reward model what it thinks of responses."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from onebase.client.commands.judging import Judge, Verdict, number, ranked
from onebase.client.commands.options import DEFAULT_SERVER, Json, Server, open_client
from onebase.client.commands.reward_pipe import judge_lines
from onebase.client.commands.reward_repl import converse
from onebase.client.terminal import console, print_json


def reward(
    prompt: Annotated[str | None, typer.Argument(help="What the policy was given.")] = None,
    responses: Annotated[
        list[str] | None, typer.Argument(help="What it might have written; several are ranked.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            metavar="NAME",
            help="Reward adapter to ask, NAME[2] for its label 2; give several to ask several.",
        ),
    ] = None,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
    repl: Annotated[bool, typer.Option("--repl", help="Ask for prompts and responses one after the other.")] = False,
) -> None:
    r"""Ask the reward model: score one response, or rank several.

    Asking does not disturb the trainings that run on the server, nor wait behind them.

    [bold]Examples[/bold]

      onebase reward "The film was" " wonderful."
      onebase reward "The film was" " wonderful." " awful." " a film."
      onebase reward "The film was" " wonderful." -a helpful -a polite
      onebase reward --repl

    [bold]Pipes[/bold]: without arguments, each line of the input is judged as it comes.

      printf 'The film was\t wonderful.\n' | onebase reward
      cat pairs.jsonl | onebase reward > judged.jsonl

    A line "prompt TAB response" is answered by "score TAB prompt TAB response",
    with a score for each adapter. A JSON object with "prompt" and "response"
    is answered by the same object with "score" and "scores" in it. Where several
    adapters are asked, "score" is their mean.
    """
    if repl and responses:
        raise typer.BadParameter("--repl asks for the responses; give at most a prompt", param_hint="RESPONSES")
    piped = prompt is None and not repl
    if piped and sys.stdin.isatty():
        raise typer.BadParameter("give a prompt and at least one response, or --repl, or a pipe", param_hint="PROMPT")
    if prompt is not None and not responses and not repl:
        raise typer.BadParameter("give at least one response to the prompt", param_hint="RESPONSES")
    with open_client(server) as client:
        judge = Judge(client, tuple(adapter or ()))
        if repl:
            converse(judge, prompt, as_json=as_json)
        elif piped:
            judge_lines(judge, sys.stdin.buffer, as_json=as_json)
        else:
            _rank(judge([(prompt or "", response) for response in responses or ()]), as_json=as_json)


def _rank(verdicts: list[Verdict], *, as_json: bool) -> None:
    best_first = ranked(verdicts)
    if as_json:
        for rank, verdict in enumerate(best_first, start=1):
            print_json({"rank": rank, **verdict.record()})
        return
    console().print(_table(best_first))


def _table(best_first: list[Verdict]) -> Table:
    names = list(best_first[0].reward.scores)
    table = Table(title=Text(best_first[0].prompt), title_justify="left")
    table.add_column("#", justify="right")
    for name in names:
        table.add_column(Text(name), justify="right")
    if len(names) > 1:
        table.add_column("mean", justify="right")
    table.add_column("response", overflow="fold")
    for rank, verdict in enumerate(best_first, start=1):
        scores = [number(verdict.reward.scores[name]) for name in names]
        mean = [number(verdict.score)] if len(names) > 1 else []
        table.add_row(str(rank), *scores, *mean, Text(verdict.response), style="bold" if rank == 1 else "")
    return table
