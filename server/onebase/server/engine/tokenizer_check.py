"""Whether an adapter was trained with the base's tokenizer: other ids for the same text make every number meaningless.

PEFT and TRL save the tokenizer beside an adapter, and our own manifests name its fingerprint. What counts is how texts
become ids: the vocabulary, the end-of-sequence token, and what a few sentences are read as. A padding token does not
count, as no model ever reads one: neither which token it is, nor one that was added to the end of the vocabulary.

Only JSON is read (tokenizer.json and what describes it), by the class of the base's own tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from onebase.server.errors import FailedPrecondition, InvalidArgument

log = logging.getLogger(__name__)

_FILE = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_SAMPLES = (
    "The film was good, wasn't it?  I'd give it 10/10 (12345 stars)!\n\tYes.",
    " naïve Ünïcödé ﬁ e\u0301 — 你好，世界。 映画 한국어 مرحبا नमस्ते 👩‍👩‍👧‍👦 def f(x): return x**2",
)
_WAY_OUT = (
    "serve the base with the adapter's tokenizer (--tokenizer), or train the adapter with the base's; if the files "
    "beside the adapter are not what it was trained with, take them away"
)


@dataclass(frozen=True)
class Reading:
    """How a tokenizer reads texts."""

    vocabulary: dict[str, int]
    eos: str | None
    samples: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Reading:
        """A tokenizer's."""
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        pad = tokenizer.pad_token
        if pad is not None and pad != tokenizer.eos_token and vocabulary.get(pad) == max(vocabulary.values()):
            vocabulary = {token: i for token, i in vocabulary.items() if token != pad}
        end = tokenizer.eos_token_id  # which some put behind a text: the server does as it is asked
        samples = (tokenizer(text)["input_ids"] for text in _SAMPLES)
        cut = tuple(tuple(ids[:-1] if ids and ids[-1] == end else ids) for ids in samples)
        return cls(vocabulary, tokenizer.eos_token, cut)

    def fingerprint(self) -> str:
        """SHA-256 of all of it."""
        everything = (sorted(self.vocabulary.items()), self.eos, self.samples)
        return hashlib.sha256(json.dumps(everything).encode()).hexdigest()

    def difference(self, base: Reading) -> str:
        """The first thing that is not as the base's tokenizer has it, in words; of two that are not equal."""
        for token, i in sorted(self.vocabulary.items(), key=lambda entry: entry[1]):
            if base.vocabulary.get(token) != i:
                there = f"id {base.vocabulary[token]}" if token in base.vocabulary else "none"
                return f"{token!r} is its id {i}, and the base's tokenizer has {there} for it ({self._sizes(base)})"
        if len(self.vocabulary) < len(base.vocabulary):
            token = next(token for token in base.vocabulary if token not in self.vocabulary)
            return f"it lacks {token!r} ({self._sizes(base)})"
        if self.eos != base.eos:
            return f"its end-of-sequence token is {self.eos!r}, and the base's is {base.eos!r}"
        for text, ids, theirs in zip(_SAMPLES, self.samples, base.samples, strict=True):
            if ids != theirs:
                return f"it reads {text[:20]!r}… as the ids {list(ids[:5])}…, and the base's as {list(theirs[:5])}…"
        raise ValueError("the two are equal")

    def _sizes(self, base: Reading) -> str:
        return f"{len(self.vocabulary)} and {len(base.vocabulary)} tokens"


class TokenizerCheck:
    """Compares the tokenizers of adapters with the base's.

    Args:
        tokenizer: the base's, for the thread that loads adapters alone.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        base = Reading.of(tokenizer)  # not kept: a vocabulary takes megabytes
        self.manifest = {"fingerprint": base.fingerprint(), "size": len(base.vocabulary), "eos": base.eos}
        """What a saved adapter's manifest says of the tokenizer."""
        self._passed: set[str] = set()  # files that were compared before, by their hashes

    def check(self, path: Path, manifest: dict[str, Any]) -> None:
        """Refuses an adapter that was trained with another tokenizer; one that says nothing of it passes.

        Args:
            path: its directory.
            manifest: its onebase.json, or nothing.

        Raises:
            FailedPrecondition: TOKENIZER_MISMATCH.
            InvalidArgument: BAD_TOKENIZER.
        """
        said, ours = manifest.get("tokenizer"), self.manifest
        if isinstance(said, dict) and said.get("fingerprint") != ours["fingerprint"]:
            differs = [f"{name} {said.get(name)!r} there and {ours[name]!r} here" for name in ("size", "eos")]
            raise _mismatch(path, f"its manifest names another fingerprint ({', '.join(differs)})")
        if (path / _FILE).is_file():
            self._compare_files(path)
        elif (path / _CONFIG).is_file():
            log.warning("%s has a tokenizer without %s, which was not compared with the base's", path, _FILE)

    def _compare_files(self, path: Path) -> None:
        digest = hashlib.sha256()
        for name in (_FILE, _CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"):
            digest.update((path / name).read_bytes() if (path / name).is_file() else b"-")
        if digest.hexdigest() in self._passed:
            return
        try:
            tokenizer = type(self._tokenizer).from_pretrained(str(path), local_files_only=True)
            theirs = Reading.of(tokenizer)
        except BaseException as error:  # the files are someone else's, and may be wrong in any way
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of the library in Rust
                raise
            raise InvalidArgument(
                "BAD_TOKENIZER", f"the tokenizer beside the adapter in {path} cannot be read: {error}", field="path"
            ) from error
        if theirs.fingerprint() != self.manifest["fingerprint"]:
            raise _mismatch(path, theirs.difference(Reading.of(self._tokenizer)))
        if tokenizer.chat_template is not None and tokenizer.chat_template != self._tokenizer.chat_template:
            log.warning(
                "the adapter in %s was trained with another chat template than this server's: conversations are "
                "rendered with the server's (--chat-template)",
                path,
            )
        self._passed.add(digest.hexdigest())


def _mismatch(path: Path, what: str) -> FailedPrecondition:
    return FailedPrecondition(
        "TOKENIZER_MISMATCH",
        f"{path} was trained with another tokenizer than the base's: {what}. {_WAY_OUT}",
        field="path",
    )
