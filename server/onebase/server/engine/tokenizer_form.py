"""What a tokenizer.json says, read as data: another's is never run.

Normalizers and regular expressions of a file that somebody else wrote can take all memory or any time on a short text,
and the library in Rust ends the process then. So two tokenizers are taken for the same where their files say the same.
Only what makes no difference to the ids of a text is passed over: how merges are spelled, defaults that are
written out, offsets, decoders, padding, truncation, and an end-of-sequence token that is put behind a text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
_SPECIALS = "special_tokens_map.json"
_TEMPLATE = "chat_template.jinja"
FILES = (FILE, CONFIG, _SPECIALS, "added_tokens.json", _TEMPLATE)
_SLACK = 65_536
"""Things that a file may hold beyond twice as many as the base's."""


class TooLarge(ValueError):
    """A file that is too large to be the base's."""


def count(text: bytes) -> int:
    """About how many things a JSON text holds; each takes many bytes once it is parsed."""
    return sum(text.count(sign) for sign in (b",", b"[", b"{"))


class TokenizerFiles:
    """The files of a tokenizer in a directory, parsed.

    Args:
        path: the directory.
        most: bytes that each may have.
        things: of the base's tokenizer.json.

    Raises:
        TooLarge: one is larger.
        ValueError, TypeError, KeyError, AttributeError, RecursionError: one is not of its form; its methods say so too.
    """

    def __init__(self, path: Path, most: int, things: int) -> None:
        self._path, self._most, self._things = path, most, things
        digest = hashlib.sha256()
        for name in FILES:
            digest.update((self._read(name) or b"-") + b"\0")
        self.digest = digest.hexdigest()
        """Of all of them."""
        self.file_digest = hashlib.sha256(self._read(FILE) or b"").hexdigest()
        self.config = self._json(CONFIG)
        self._specials = self._json(_SPECIALS)

    def settings(self) -> dict[str, Any]:
        """tokenizer.json."""
        return self._json(FILE)

    def named(self, key: str) -> str | None:
        """A token that is named, such as eos_token."""
        value = self.config.get(key, self._specials.get(key))
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) else None

    def added(self) -> dict[str, int]:
        """Tokens that tokenizer_config.json adds."""
        listed = self.config.get("added_tokens_decoder") or {}
        return _checked({token["content"]: int(i) for i, token in listed.items()})

    def chat_template(self) -> str | None:
        """The chat template, where there is one alone."""
        written = self._read(_TEMPLATE)
        template = self.config.get("chat_template") if written is None else written.decode()
        return template if isinstance(template, str) else None

    def _read(self, name: str) -> bytes | None:
        path = self._path / name
        if not path.is_file():
            return None
        with path.open("rb") as file:
            data = file.read(self._most + 1)
        if len(data) > self._most:
            raise TooLarge(f"its {name} has more than {self._most} bytes, and the base's has fewer than half")
        return data

    def _json(self, name: str) -> dict[str, Any]:
        text = self._read(name)
        if text is None:
            return {}
        if count(text) > 2 * self._things + _SLACK:
            raise TooLarge(f"its {name} holds more than twice as much as the base's")
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError(f"{name} is not a JSON object")
        return found


def vocabulary(settings: dict[str, Any]) -> dict[str, int]:
    """The ids of a tokenizer.json's tokens."""
    listed = settings["model"]["vocab"]
    known = {token: i for i, (token, _) in enumerate(listed)} if isinstance(listed, list) else dict(listed)
    return _checked(known | {token["content"]: token["id"] for token in added(settings)})


def added(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The tokens that a tokenizer.json looks for in a text before anything else."""
    found: list[dict[str, Any]] = settings.get("added_tokens") or []
    return found


def parts(settings: dict[str, Any], end: int | None) -> dict[str, str]:
    """How a tokenizer.json reads texts, apart from the vocabulary; what is long as its hash.

    Args:
        settings: the file.
        end: the id of the end-of-sequence token.
    """
    model = settings["model"]
    listed, merges = model["vocab"], model.get("merges") or ()
    plain = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    scores = [score for _, score in listed] if isinstance(listed, list) else []
    return {
        "normalizer": _text(settings.get("normalizer")),
        "pre_tokenizer": _text(settings.get("pre_tokenizer")),
        "post_processor": _text(list(_steps(settings.get("post_processor"), end))),
        "model": _text({key: value for key, value in plain.items() if not (value is False or value == "")}),
        "list of merges": digest([one.split(" ") if isinstance(one, str) else one for one in merges]),
        "list of scores": digest(scores),
    }


def digest(value: object) -> str:
    """SHA-256 of a value's JSON."""
    return hashlib.sha256(_text(value).encode()).hexdigest()


def _text(value: object) -> str:
    return json.dumps(_told(value), sort_keys=True)


def _told(value: Any) -> Any:
    """A value without what is not set, and without what only offsets depend on."""
    if isinstance(value, list):
        return [_told(one) for one in value]
    if isinstance(value, dict):
        return {key: _told(one) for key, one in value.items() if one is not None and key != "trim_offsets"}
    return value


def _steps(processor: dict[str, Any] | None, end: int | None) -> Iterator[Any]:
    """What a post-processor puts around one text."""
    if processor is None or processor["type"] == "ByteLevel":  # which only counts offsets
        return
    if processor["type"] == "Sequence":
        for one in processor["processors"]:
            yield from _steps(one, end)
    elif processor["type"] == "TemplateProcessing":
        ids = {name: token["ids"] for name, token in processor["special_tokens"].items()}
        pieces = [ids[one["SpecialToken"]["id"]] if "SpecialToken" in one else "text" for one in processor["single"]]
        if pieces and pieces[-1] == [end]:
            pieces.pop()
        if pieces != ["text"]:
            yield pieces
    else:
        yield processor


def _checked(ids: dict[Any, Any]) -> dict[str, int]:
    if not all(isinstance(token, str) and type(i) is int for token, i in ids.items()):
        raise ValueError("its vocabulary is not one of texts and ids")
    return ids
