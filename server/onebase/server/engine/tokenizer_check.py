"""Whether an adapter was trained with the base's tokenizer: other ids for the same text make every number meaningless.

PEFT and TRL save the tokenizer beside an adapter, and our own manifests name its fingerprint. What counts is how texts
become ids: the vocabulary, the end-of-sequence token, and how a text is cut into tokens. A padding token does not
count, as no model ever reads one: neither which token it is, nor one that was added to the end of the vocabulary.

Only JSON is read (tokenizer.json and what describes it), and only as data (`tokenizer_form`): no tokenizer is
ever run but the base's.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from onebase.server.engine import tokenizer_form
from onebase.server.engine.tokenizer_form import CONFIG, FILE, TokenizerFiles
from onebase.server.errors import FailedPrecondition, InvalidArgument

log = logging.getLogger(__name__)

_LARGER = 2**20
"""Bytes that a file of a tokenizer may have beyond twice the base's."""
_MOST_TOLD = 256
"""Characters of somebody else's text in a message."""
_MAX_PASSED = 1024
"""Tokenizers that are remembered: anybody may write the same one in any number of ways."""
_SAMPLES = (
    "The film was good, wasn't it?  I'd give it 10/10 (12345 stars)!\n\tYes.",
    " naïve Ünïcödé ﬁ e\u0301 — 你好，世界。 映画 한국어 مرحبا नमस्ते 👩‍👩‍👧‍👦 def f(x): return x**2",
)
_WAY_OUT = (
    "serve the base with the adapter's tokenizer (--tokenizer), or train the adapter with the base's; if the files "
    "beside the adapter are not what it was trained with, or are the base's tokenizer in another writing, take them "
    "away"
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
        vocabulary = without_padding(tokenizer.get_vocab(), tokenizer.pad_token, tokenizer.eos_token)
        end = tokenizer.eos_token_id  # which some put behind a text: the server does as it is asked
        samples = (tokenizer(text)["input_ids"] for text in _SAMPLES)
        cut = tuple(tuple(ids[:-1] if ids and ids[-1] == end else ids) for ids in samples)
        return cls(vocabulary, tokenizer.eos_token, cut)

    def fingerprint(self) -> str:
        """SHA-256 of all of it."""
        everything = (sorted(self.vocabulary.items()), self.eos, self.samples)
        return hashlib.sha256(json.dumps(everything).encode()).hexdigest()


def without_padding(vocabulary: dict[str, int], pad: str | None, eos: str | None) -> dict[str, int]:
    """A vocabulary without a padding token that was added to its end."""
    if pad is not None and pad != eos and vocabulary.get(pad) == max(vocabulary.values()):
        return {token: i for token, i in vocabulary.items() if token != pad}
    return vocabulary


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
        self._vocabulary = tokenizer_form.digest(base.vocabulary)
        writings = _writings(tokenizer)
        self._forms = [tokenizer_form.parts(json.loads(text), tokenizer.eos_token_id) for text in writings]
        self._files = {hashlib.sha256(text).hexdigest() for text in writings}
        self._most = 2 * max(map(len, writings), default=0) + _LARGER
        self._things = max(map(tokenizer_form.count, writings), default=0)
        self._added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
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
            differs = [f"{name} {_cut(said.get(name))} there and {ours[name]!r} here" for name in ("size", "eos")]
            raise _mismatch(path, f"its manifest names another fingerprint ({', '.join(differs)})")
        if (path / FILE).is_file():
            self._compare_files(path)
        elif (path / CONFIG).is_file():
            log.warning("%r has a tokenizer without %s, which was not compared with the base's", str(path), FILE)

    def _compare_files(self, path: Path) -> None:
        try:
            files = TokenizerFiles(path, self._most, self._things)
            if files.digest in self._passed:
                return
            difference, template = self._difference(files), files.chat_template()
        except tokenizer_form.TooLarge as error:
            raise _mismatch(path, str(error)) from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
            raise InvalidArgument(
                "BAD_TOKENIZER",
                f"the tokenizer beside the adapter in {path} cannot be read: {_cut(str(error), str)}",
                field="path",
            ) from error
        if difference is not None:
            raise _mismatch(path, difference)
        if template is not None and template != self._tokenizer.chat_template:
            log.warning(
                "the adapter in %r was trained with another chat template than this server's: conversations are "
                "rendered with the server's (--chat-template)",
                str(path),
            )
        if len(self._passed) >= _MAX_PASSED:
            self._passed.clear()
        self._passed.add(files.digest)

    def _difference(self, files: TokenizerFiles) -> str | None:
        """The first thing that is not as the base's tokenizer has it, in words."""
        eos = files.named("eos_token") or self._tokenizer.eos_token
        if eos != self._tokenizer.eos_token:
            return f"its end-of-sequence token is {_cut(eos)}, and the base's is {self._tokenizer.eos_token!r}"
        if files.file_digest in self._files and files.added().items() <= self._added.items():
            return None  # not even parsed: a file of megabytes holds all threads up
        settings = files.settings()
        whole = tokenizer_form.vocabulary(settings) | files.added()
        vocabulary = without_padding(whole, files.named("pad_token"), eos)
        if tokenizer_form.digest(vocabulary) != self._vocabulary:
            return _words(vocabulary, Reading.of(self._tokenizer).vocabulary)
        for token in tokenizer_form.added(settings):
            if token["content"] in vocabulary and token["content"] not in self._added:
                return f"it looks for {_cut(token['content'])} in a text before anything else, and the base's does not"
        found = tokenizer_form.parts(settings, whole.get(eos) if eos else None)
        for name, said in found.items():
            if self._forms and not any(form[name] == said for form in self._forms):
                return f"its {name} is {_cut(said, str)}, and the base's is {_cut(self._forms[0][name], str)}"
        return None if found in self._forms or not self._forms else "its parts are of several writings of the base's"


def _writings(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """The base's tokenizer.json as transformers saves it now, and as it was loaded: some are rewritten in between."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return []
    found = [backend.to_str(pretty=True).encode()]
    source = tokenizer.name_or_path
    loaded = source and cached_file(source, FILE, local_files_only=True, _raise_exceptions_for_missing_entries=False)
    return [*found, Path(loaded).read_bytes()] if loaded else found


def _words(theirs: dict[str, int], base: dict[str, int]) -> str:
    """What is not the same in two vocabularies that are not equal."""
    sizes = f"{len(theirs)} and {len(base)} tokens"
    for token, i in sorted(theirs.items(), key=lambda entry: entry[1]):
        if base.get(token) != i:
            there = f"id {base[token]}" if token in base else "none"
            return f"{_cut(token)} is its id {i}, and the base's tokenizer has {there} for it ({sizes})"
    token = next(token for token in base if token not in theirs)
    return f"it lacks {token!r} ({sizes})"


def _cut(value: object, spelled: Callable[[Any], str] = repr) -> str:
    text = spelled(value)
    return text if len(text) <= _MOST_TOLD else f"{text[:_MOST_TOLD]}…"


def _mismatch(path: Path, what: str) -> FailedPrecondition:
    return FailedPrecondition(
        "TOKENIZER_MISMATCH",
        f"{path} was trained with another tokenizer than the base's: {what}. {_WAY_OUT}",
        field="path",
    )
