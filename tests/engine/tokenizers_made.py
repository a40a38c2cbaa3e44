"""Small tokenizers of the kinds that matter, trained on the spot."""

from __future__ import annotations

import json
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<s>", "</s>", "<unk>")
CORPUS = (
    "The film was good, and the acting was a delight.",
    "Le film était très naïf — ça va? Ünïcödé",
    "你好，世界。电影很好看。",
    "映画はとても良かったです。",
    "مرحبا بالعالم، كان الفيلم جميلا",
    "שלום עולם",
    "नमस्ते दुनिया",
    "😀 😁 👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 ☃️",
)


def byte_level(*, prefix_space: bool = False) -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen have: bytes spelled in letters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(tokenizer, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, **_trainer()))


def llama_2() -> PreTrainedTokenizerFast:
    """As Llama 2 has: sentencepiece's BPE, a space before every text, bytes for what it has no token for."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _sentencepiece(tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    """The same in a newer writing, with the space only at the very beginning."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return _sentencepiece(tokenizer)


ALL = {"byte_level": byte_level, "llama_2": llama_2, "metaspace": metaspace}


def _sentencepiece(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    known = [*"▁abcdefghijklmnopqrstuvwxyzéïü,.好影は😀"]  # what else there is in the corpus becomes bytes
    alphabet = {"initial_alphabet": known, "limit_alphabet": len(known)}
    few = trainers.BpeTrainer(vocab_size=380, **alphabet, **_trainer([f"<0x{byte:02X}>" for byte in range(256)]))
    return _trained(tokenizer, few)


def _trainer(plain: list[str] | None = None) -> dict[str, object]:
    return {"special_tokens": [*SPECIAL, *(plain or ())], "show_progress": False}


def _trained(tokenizer: Tokenizer, trainer: trainers.BpeTrainer) -> PreTrainedTokenizerFast:
    tokenizer.train_from_iterator(_lines(), trainer)
    settings = json.loads(tokenizer.to_str())
    settings["added_tokens"] = [token for token in settings["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(settings))  # the trainer takes the bytes for special tokens
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _lines() -> Iterator[str]:
    for _ in range(3):
        yield from CORPUS
