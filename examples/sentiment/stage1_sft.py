"""Stage 1: the base model learns the language of the reviews, by supervised fine-tuning with TRL's SFTTrainer.

A small Llama, from scratch, with a tokenizer of its own:

    python examples/sentiment/stage1_sft.py .demo/base

or a model and a data set that you have:

    python examples/sentiment/stage1_sft.py base --model MODEL --data DATASET --column text --learning-rate 2e-5

Writes the model with its tokenizer to OUTPUT, and the losses to OUTPUT.json.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from common import record_path, write_json
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from training import CPU_SETTINGS, PrintProgress, load_rows, prepare
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from trl import SFTConfig, SFTTrainer

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


@dataclass(frozen=True)
class SmallLlama:
    """The shape of the model that is trained from scratch."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    max_position_embeddings: int = 128
    initializer_range: float = 0.06  # so narrow a model learns three times as fast from this as from the usual 0.02


def train_tokenizer(texts: Sequence[str], vocab_size: int = 1200) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text comes back as it was; BOS goes in front; PAD is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=SmallLlama.max_position_embeddings,
    )


def small_llama(tokenizer: PreTrainedTokenizerFast, shape: SmallLlama = SmallLlama()) -> LlamaForCausalLM:
    """A Llama with fresh weights, in float32, whose embedding is its output layer too."""
    return LlamaForCausalLM(
        LlamaConfig(
            **asdict(shape),
            vocab_size=len(tokenizer),
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def main(
    output: Annotated[Path, typer.Argument(help="Directory for the model and its tokenizer.")],
    model: Annotated[str, typer.Option(help="Hub id or directory to go on from; empty starts from scratch.")] = "",
    data: Annotated[str, typer.Option(help="A JSON Lines file, or a hub id.")] = ".demo/data/corpus.jsonl",
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "train",
    column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    heldout: Annotated[int, typer.Option(help="Rows kept for the held-out loss.")] = 400,
    epochs: Annotated[float, typer.Option(help="Passes over the rows.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak rate; use 2e-5 or so with --model.")] = 4e-3,
    max_length: Annotated[int, typer.Option(help="Longest row in tokens; the rest of it is cut.")] = 128,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of weights and order.")] = 0,
) -> None:
    """Trains the base model."""
    began = time.monotonic()
    record_path(output).unlink(missing_ok=True)
    prepare(threads, seed)
    rows = load_rows(data, split).train_test_split(test_size=heldout, seed=seed)
    if model:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
        network: Any = AutoModelForCausalLM.from_pretrained(model)
    else:
        tokenizer = train_tokenizer(rows["train"][column])
        network = small_llama(tokenizer)
    settings = SFTConfig(
        output_dir=str(output),
        dataset_text_field=column,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=64,
        learning_rate=learning_rate,
        warmup_steps=0.05,
        max_length=max_length,
        seed=seed,
        **CPU_SETTINGS,
    )
    trainer = SFTTrainer(
        model=network,
        args=settings,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
        callbacks=[PrintProgress("entropy")],
    )
    trainer.remove_callback(PrinterCallback)
    losses = trainer.train().metrics | trainer.evaluate()
    network.config.use_cache = True  # the trainer turned it off
    network.save_pretrained(output)
    tokenizer.save_pretrained(output)
    record = {key: float(losses[key]) for key in ("train_loss", "eval_loss")}
    write_json(record_path(output), record | {"seconds": time.monotonic() - began})


if __name__ == "__main__":
    typer.run(main)
