"""Every code block of every page is run, in order, as a reader would run it.

A page is read in a directory of its own that holds `base/` (a small Llama), `reward/`, `sft/` (adapters of it),
`reward-of-another-base/` (whose tokenizer is another) and `prompts.jsonl`. Its blocks, by language:

    sh        is run; `onebase serve` runs in the background until the page ends, on a free port
    python    is run; blocks of a page share their names
    yaml      is written to the file that its first line names: `# policy_1.yaml`; so is jinja: `{# chat.jinja #}`
    text      is what a program may print, and is not looked at
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from oracle.fixtures import FIXTURES
from support import environment

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md"))
ADDRESS = "127.0.0.1:7070"
LANGUAGES = {"sh", "python", "yaml", "jinja", "text"}
BLOCK = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(m[1], m[2], text.count("\n", 0, m.start()) + 2) for m in BLOCK.finditer(text)]


class Reader:
    """Runs blocks in a directory, and knows the server that a page has started."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.address = ADDRESS
        self._folder = folder
        self._stack = stack
        self._names: dict[str, Any] = {"__name__": "__main__"}

    def run(self, page: Path, block: Block) -> None:
        text = block.text.replace(ADDRESS, self.address)
        if block.language in ("yaml", "jinja"):
            name = re.match(r"(?:# |\{# )(\S+)", text)
            assert name is not None, f"{page.name}:{block.line}: the first line names the file"
            (self._folder / name[1]).write_text(text)
        elif block.language == "sh" and text.startswith("onebase serve"):
            self._serve(text)
        elif block.language == "sh":
            done = subprocess.run(
                ["bash", "-euc", text], cwd=self._folder, env=self._environment(), capture_output=True, text=True
            )
            assert done.returncode == 0, f"{page.name}:{block.line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        elif block.language == "python":
            source = "\n" * (block.line - 1) + text  # so that a traceback shows the page's line
            exec(compile(source, str(page), "exec"), self._names)

    def _environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {**environment(), "PATH": path, "ONEBASE_SERVER": self.address}

    def _serve(self, text: str) -> None:
        port_file, log = self._folder / "port", self._folder / "server.log"
        port_file.unlink(missing_ok=True)
        command = [*shlex.split(text.replace("\\\n", " ")), "--port", "0", "--port-file", str(port_file)]
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=self._folder, env=self._environment(), stdout=out, stderr=subprocess.STDOUT
            )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        until = time.monotonic() + 120
        while not (port_file.exists() and port_file.read_text().strip()):
            assert process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < until, log.read_text(errors="replace")
            time.sleep(0.05)
        self.address = f"127.0.0.1:{port_file.read_text().strip()}"


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    for name, source in (("base", "base"), ("reward", "reward"), ("sft", "policy")):
        shutil.copytree(FIXTURES / source, tmp_path / name)
    (tmp_path / "sft" / "value_head.safetensors").unlink()
    other = Path(shutil.copytree(FIXTURES / "reward", tmp_path / "reward-of-another-base"))
    shutil.copy(FIXTURES / "base" / "tokenizer_config.json", other)
    words = (FIXTURES / "base" / "tokenizer.json").read_text().replace('"w10"', '"w"').replace('"w11"', '"w10"')
    (other / "tokenizer.json").write_text(words.replace('"w"', '"w11"'))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w5 w6 w7"}\n{"prompt": "w8 w9"}\n' * 8)
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack:
        yield Reader(tmp_path, stack)


@pytest.mark.filterwarnings("default")  # of the libraries that a reader uses
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_the_page_runs(page: Path, reader: Reader) -> None:
    for block in blocks(page):
        reader.run(page, block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_says_what_it_is_and_every_link_leads_somewhere(page: Path) -> None:
    assert {block.language for block in blocks(page)} <= LANGUAGES
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_first_page_makes_the_promise_that_the_page_of_its_trials_explains() -> None:
    promise = (
        "every step that was answered is durable; a run that was killed ends bit-identical to one that was not; "
        "no tenant can see, change or starve another"
    )
    first = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## ")[0]
    assert promise in first
    assert all(part in first for part in ("--state", "--durability step", "--tokens", "](docs/reliability.md)"))
    tried = " ".join((ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").split())
    assert promise[1:] in tried
