"""Makes the asyncio client out of the sync one, so that what differs only by async and await is written once.

    python tools/make_aio.py            # writes client/onebase/client/aio/{calls,client,session,policy}.py
    python tools/make_aio.py --check    # fails if they are not what the sync modules say

What truly differs (how a call is sent, what keeps a session alive) stands in aio/transport.py and aio/keepalive.py,
written by hand; their coroutines are where awaiting begins. From there:

* a function that awaits is a coroutine, and whoever calls it awaits it: a method by its name, so one name must not be
  a coroutine in one class and a plain method in another;
* what is annotated as a stream, session or client is entered by `async with` and iterated by `async for`, and
  `list(stream)` becomes an asynchronous comprehension;
* a coroutine that gives a session or a client may also be entered without `await` (`opening.opens`);
* a lock goes: a block under it awaits nothing, so nothing else runs on the event loop meanwhile;
* public classes get new names (`RENAMED`), and comments, docstrings and messages new words (`prose`).

What these rules cannot say is refused with its file and line. The rest of the text, comments too, stays as it is.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from twins.change import Change
from twins.facts import gather
from twins.modules import Module, Refused

ROOT = Path(__file__).parents[1]
SYNC = ROOT / "client" / "onebase" / "client"
AIO = SYNC / "aio"
MADE = ("calls", "client", "session", "policy")
"""Modules that are made."""
BY_HAND = ("transport", "keepalive")
"""Modules of which both twins are written by hand."""


def make(sync: Mapping[str, str], by_hand: Mapping[str, str]) -> dict[str, str]:
    """The texts of the twins, formatted.

    Args:
        sync: the sync modules' texts, by name.
        by_hand: the texts of the twins that are written by hand, by name.

    Raises:
        Refused: a line has no twin under the rules.
    """
    modules = [Module(name, text) for name, text in sync.items()]
    facts = gather(modules, by_hand)
    return {module.name: _finish(Change(module, facts), module.name) for module in modules}


def _finish(change: Change, name: str) -> str:
    text = change.made()
    text = f"# Made from {name}.py by tools/make_aio.py: change that, then `make aio`.\n{text}"
    where = ["--stdin-filename", str(AIO / f"{name}.py"), "-"]
    for command in (["check", "--quiet", "--fix-only", "--select", "F401,I"], ["format", "--quiet"]):
        ruff = [sys.executable, "-m", "ruff", *command, *where]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return text


def main() -> int:
    """Writes the twins, or with --check compares them; the exit code."""
    sync = {name: (SYNC / f"{name}.py").read_text(encoding="utf-8") for name in MADE}
    by_hand = {name: (AIO / f"{name}.py").read_text(encoding="utf-8") for name in BY_HAND}
    try:
        made = make(sync, by_hand)
    except Refused as refusal:
        print(f"no asyncio twin: {refusal}", file=sys.stderr)
        return 1
    stale = []
    for name, text in made.items():
        path = AIO / f"{name}.py"
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(str(path.relative_to(ROOT)))
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
    if stale and "--check" in sys.argv:
        print(f"stale: {', '.join(stale)}: run 'make aio' and commit them", file=sys.stderr)
        return 1
    print("\n".join(f"made {path}" for path in stale) or "the asyncio client is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
