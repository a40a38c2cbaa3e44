"""The contract's form: everything is commented, enums begin unspecified, and the stubs load without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PROTOS = sorted((Path(__file__).parents[2] / "proto" / "onebase" / "v1").glob("*.proto"))
DECLARATION = re.compile(r"^\s*(message|enum|service|rpc|oneof)\s+(\w+)|^\s*[\w.<>, ]+\s+(\w+)\s*=\s*\d+\s*[;\[]")


def declarations(text: str) -> list[tuple[str, str, str]]:
    """(keyword or "field", name, the comment above it)."""
    found, lines = [], text.splitlines()
    for number, line in enumerate(lines):
        match = DECLARATION.match(line)
        if match is None or line.strip().startswith(("syntax", "//", "package", "option")):
            continue
        comment, above = [], number - 1
        while above >= 0 and lines[above].strip().startswith("//"):
            comment.insert(0, lines[above].strip().lstrip("/ "))
            above -= 1
        found.append((match[1] or "field", match[2] or match[3], " ".join(comment)))
    return found


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.stem)
def test_everything_is_commented(path: Path) -> None:
    found = declarations(path.read_text(encoding="utf-8"))
    assert len(found) > 5
    bare = [f"{kind} {name}" for kind, name, comment in found if len(comment) < 5]
    assert not bare


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.stem)
def test_every_service_names_its_errors(path: Path) -> None:
    for kind, name, comment in declarations(path.read_text(encoding="utf-8")):
        if kind == "service":
            assert "Errors" in comment, name


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.stem)
def test_enums_begin_unspecified(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name, body in re.findall(r"enum (\w+) \{(.*?)\}", text, re.DOTALL):
        prefix = "DTYPE" if name == "DType" else re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).upper()
        assert f"{prefix}_UNSPECIFIED = 0;" in body


def test_the_stubs_load_without_a_warning() -> None:
    modules = [f"onebase.v1.{path.stem}_pb2_grpc" for path in PROTOS]
    code = f"import {', '.join(modules)}"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
