"""`onebase generate`: let a policy write."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from onebase.client.codec.inference import join_chunks
from onebase.client.commands.options import DEFAULT_SERVER, Chat, Chatting, Json, Server, System, open_client
from onebase.client.terminal import print_json, print_note
from onebase.client.types import BASE, Completion, CompletionChunk, SamplingParams


def generate(
    prompt: Annotated[str, typer.Argument(help="What to go on from.")],
    adapter: Annotated[
        str, typer.Option("--adapter", "-a", metavar="NAME", help='The policy that writes; "base" has no adapter.')
    ] = BASE,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-m", min=1, help="Most tokens to write.")] = 64,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="How many completions.")] = 1,
    temperature: Annotated[float, typer.Option("--temperature", "-t", min=0.0, help="0 is greedy.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k most probable tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Keep the tokens that make up this mass.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Drop tokens less probable than this share of the best one's.")
    ] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End at this text; may be repeated.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed writes the same; none draws one.")] = None,
    min_new_tokens: Annotated[int, typer.Option(min=0, help="Do not end before so many tokens.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-sequence token.")] = False,
    chat: Chat = False,
    system: System = None,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Let a policy write, and watch it.

    The text goes to stdout as it is written; who wrote it, and why it ended, to stderr.

    [bold]Examples[/bold]

      onebase generate "The film was"
      onebase generate "The film was" --adapter policy_1 --n 4 --max-new-tokens 20
      onebase generate "The film was" --adapter policy_1 --temperature 0
      onebase generate "The film was" --adapter policy_1 --seed 7 --stop "." --json
      onebase generate "What is the capital of France?" --system "Be brief."
    """
    sampling = SamplingParams(
        max_new_tokens=max_new_tokens,
        n=n,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        stop=tuple(stop or ()),
        seed=seed,
        ignore_eos=ignore_eos,
        min_new_tokens=min_new_tokens,
    )
    said = Chatting.of(chat, system).prompt(prompt)
    with open_client(server) as client, client.stream(said, adapter=adapter, sampling=sampling) as chunks:
        if as_json:
            for completion in join_chunks(chunks):
                print_json(_record(prompt, completion))
        else:
            write_live(chunks)


def write_live(chunks: Iterable[CompletionChunk]) -> None:
    """Writes completions one after the other, the first that is unfinished as it comes.

    They are drawn side by side; what comes of a later one is kept until its turn.
    """
    waiting: defaultdict[int, list[CompletionChunk]] = defaultdict(list)
    turn = 0
    tokens = 0
    for chunk in chunks:
        waiting[chunk.completion_index].append(chunk)
        while waiting[turn]:
            piece = waiting[turn].pop(0)
            tokens += len(piece.tokens)
            typer.echo(piece.text, nl=False)
            if piece.finish_reason is not None:
                typer.echo()
                print_note(_note(piece, tokens))
                turn, tokens = turn + 1, 0


def _note(last: CompletionChunk, tokens: int) -> str:
    adapter = last.adapter
    return f"{adapter.name} version {adapter.version}: {tokens} tokens, {last.finish_reason}, seed {last.seed}"


def _record(prompt: str, completion: Completion) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "completion_index": completion.completion_index,
        "text": completion.text,
        "tokens": completion.tokens.tolist(),
        "finish_reason": completion.finish_reason,
        "adapter": completion.adapter.name,
        "version": completion.adapter.version,
        "seed": completion.seed,
    }
