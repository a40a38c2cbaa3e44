"""`onebase reward` in a pipe: a line in, a line out, as they come."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from types import UnionType
from typing import Any, BinaryIO, cast

import typer

from onebase.client.commands.judging import Judge, Verdict
from onebase.client.errors import InvalidArgumentError
from onebase.client.terminal import print_error, print_json
from onebase.client.types import Content

BATCH = 32
"""Most lines to judge in one call."""
CHUNK_BYTES = 64 * 1024


@dataclass(frozen=True)
class Line:
    """A line of the input: its number from 1, its pair, and its JSON object if it is one."""

    number: int
    prompt: Content
    response: Content
    record: dict[str, Any] | None


class LineError(ValueError):
    """A line that cannot be judged."""


def judge_lines(judge: Judge, stream: BinaryIO, *, as_json: bool) -> None:
    """Judges every line of a stream; a bad line ends it with status 1, after the answers to those before it."""
    number = 0
    try:
        for raw_lines in line_batches(stream):
            lines: list[Line] = []
            trouble: LineError | None = None
            for raw in raw_lines:
                number += 1
                try:
                    line = parse_line(raw, number)
                except LineError as error:
                    trouble = error
                    break
                lines += [] if line is None else [line]
            _judge(judge, lines, as_json=as_json)
            if trouble:
                raise trouble
    except LineError as error:
        print_error(str(error))
        raise typer.Exit(1) from None


def line_batches(stream: BinaryIO) -> Iterator[list[bytes]]:
    """Lines in batches: those that are there already go together, and none waits for one that is still to come."""
    rest = b""
    reader = cast("BufferedIOBase", stream)
    while chunk := reader.read1(CHUNK_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        for start in range(0, len(lines), BATCH):
            yield lines[start : start + BATCH]
    if rest:
        yield [rest]


def parse_line(raw: bytes, number: int) -> Line | None:
    """A line of JSON or of prompt TAB response; None if it is blank.

    Raises:
        LineError: it is neither.
    """
    try:
        text = raw.decode().rstrip("\r")
    except UnicodeDecodeError as error:
        raise LineError(f"line {number} is not UTF-8: {error}") from None
    if not text.strip():
        return None
    if text.lstrip().startswith("{"):
        return _parse_json(text, number)
    prompt, tab, response = text.partition("\t")
    if not tab:
        raise LineError(f'line {number} is neither prompt TAB response nor {{"prompt": …, "response": …}}: {text!r}')
    return Line(number, prompt, response, record=None)


def _parse_json(text: str, number: int) -> Line:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise LineError(f"line {number} is not JSON: {error}") from None
    if "messages" in record:
        return Line(number, [], _content(record, "messages", number, kinds=list), record)
    response = "completion" if "completion" in record and "response" not in record else "response"
    return Line(number, _content(record, "prompt", number), _content(record, response, number), record)


def _content(record: dict[str, Any], key: str, number: int, kinds: type | UnionType = str | list) -> Content:
    """A text, or a list of messages (what is in it, the codec checks)."""
    content = record.get(key)
    if not isinstance(content, kinds):
        raise LineError(f'line {number} has no {"list of messages" if kinds is list else "text"} "{key}"')
    return cast("Content", content)


def _judge(judge: Judge, lines: list[Line], *, as_json: bool) -> None:
    if not lines:
        return
    try:
        verdicts = judge([(line.prompt, line.response) for line in lines])
    except (InvalidArgumentError, TypeError, ValueError) as error:
        if len(lines) == 1:
            raise LineError(f"line {lines[0].number}: {error}") from None
        for line in lines:  # one of them is refused: answer those before it, and name it
            _judge(judge, [line], as_json=as_json)
        return
    for line, verdict in zip(lines, verdicts, strict=True):
        _write(line, verdict, as_json=as_json)


def _write(line: Line, verdict: Verdict, *, as_json: bool) -> None:
    if as_json or line.record is not None:
        print_json({**(line.record or verdict.said()), **verdict.scores()})
    else:
        scores = [f"{score:.6g}" for score in verdict.reward.scores.values()]
        typer.echo("\t".join([*scores, str(line.prompt), str(line.response)]))
