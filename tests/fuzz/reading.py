"""Reads spoiled adapters with the engine's own code, one after the other, in a process that somebody else watches.

Before each input its number is written to the progress file; each finding is a line of JSON on standard output, and the
last line counts how the inputs ended: OK, or the code that a client would be told.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
import traceback
from collections import Counter
from pathlib import Path
from random import Random

from fuzz.files import Files, spoiled_directory
from oracle.fixtures import FIXTURES
from peft import LoraConfig

from onebase.server.config import EngineConfig
from onebase.server.engine import Engine, open_engine
from onebase.server.engine.formats import Target
from onebase.server.errors import Internal, OnebaseError
from onebase.server.jobs import AdapterKind, LoadAdapterJob
from onebase.server.status import code_of

MAX_RANK = 512


def drawn(seed: int, number: int, wholes: list[Files]) -> tuple[Random, Files]:
    """The input of this number: a directory's files."""
    random = Random(f"{seed}/files/{number}")
    files = spoiled_directory(random, random.choice(wholes))
    return random, sealed(files) if random.random() < 0.7 else files


def sealed(files: Files) -> Files:
    """The same with true hashes in its manifest, if it has one that can be read."""
    try:
        manifest = json.loads(files["onebase.json"])
        manifest["sha256"] = {
            name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != "onebase.json"
        }
        return {**files, "onebase.json": json.dumps(manifest).encode()}
    except (KeyError, ValueError, TypeError, RecursionError):
        return files


def resolve_once(engine: Engine) -> None:
    """Has PEFT resolve each configuration once: it takes ten times as long as all the rest, and sees nothing else."""
    resolve, known = engine.formats.targets, {}

    def targets(config: LoraConfig, field: str) -> dict[str, Target]:
        key = repr(sorted(config.to_dict().items(), key=lambda item: item[0]))
        if key not in known:
            known[key] = resolve(config, field)
        return dict(known[key])

    engine.formats.targets = targets  # type: ignore[method-assign]


def main() -> None:
    """Reads the inputs from --first on, --count of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--first", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--wholes", type=Path, required=True)
    parser.add_argument("--progress", type=Path, required=True)
    parser.add_argument("--place", type=Path, required=True)
    asked = parser.parse_args()
    logging.disable(logging.CRITICAL)
    engine = open_engine(EngineConfig(model=str(FIXTURES / "base"), threads=1))
    wholes = [{file.name: file.read_bytes() for file in one.iterdir()} for one in sorted(asked.wholes.iterdir())]
    resolve_once(engine)
    progress = os.open(asked.progress, os.O_WRONLY | os.O_CREAT)
    for place in sorted(asked.wholes.iterdir()):  # what is imported and resolved once is not the first input's
        kind = AdapterKind.REWARD if b"SEQ_CLS" in (place / "adapter_config.json").read_bytes() else AdapterKind.POLICY
        engine.formats.load(LoadAdapterJob(uid=1, name="x", kind=kind, path=place), MAX_RANK)
    codes: Counter[str] = Counter()
    for number in range(asked.first, asked.first + asked.count):
        os.pwrite(progress, b"%020d" % number, 0)
        random, files = drawn(asked.seed, number, wholes)
        shutil.rmtree(asked.place, ignore_errors=True)
        asked.place.mkdir(parents=True)
        for name, data in files.items():
            (asked.place / name).write_bytes(data)
        job = LoadAdapterJob(
            uid=number + 1,
            name="x",
            kind=random.choice(list(AdapterKind)),
            path=asked.place,
            value_head=random.random() < 0.5,
            with_optimizer=random.random() < 0.5,
            max_bytes=random.choice([None, 2**26]),
        )
        try:
            engine.formats.load(job, MAX_RANK)
            codes["OK"] += 1
        except Internal as error:
            print(json.dumps({"number": number, "problem": f"Internal: {error}"}), flush=True)
        except OnebaseError as error:
            codes[code_of(error).name] += 1
        except BaseException as error:
            story = "".join(traceback.format_exception(error))[-4000:]
            found = {"number": number, "problem": f"{type(error).__name__}: {error}"[:500], "log": story}
            print(json.dumps(found), flush=True)
    os.pwrite(progress, b"%020d" % (asked.first + asked.count), 0)
    print(json.dumps({"codes": codes}), flush=True)


if __name__ == "__main__":
    main()
