"""What transformers, PEFT and TRL say of fixed sequences: scores, logprobs, entropies, values, greedy completions."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from generate_models import EOS, FIRST_WORD, PAD, VOCABULARY
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead

LENGTHS = (3, 4, 7, 11, 16, 23, 31, 40)
NEW_TOKENS = 12


def numbers(tensor: torch.Tensor) -> Any:
    """Floats with the nine digits that give back the same float32; JSON would otherwise write seventeen."""
    values = tensor.detach().float().tolist()
    if isinstance(values, float):
        return float(f"{values:.9g}")
    return [numbers(row) for row in tensor]


def random_ids(generator: random.Random, length: int) -> list[int]:
    """Ordinary words: no special token."""
    return [generator.randrange(FIRST_WORD, VOCABULARY) for _ in range(length)]


def pad(sequences: list[list[int]], left: bool = False) -> dict[str, torch.Tensor]:
    """A padded batch with its mask and the positions that absolute embeddings need under left padding."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), PAD)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[row, place] = torch.tensor(sequence)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def score_oracle(base: str, rewards: list[str], policies: list[str]) -> dict[str, Any]:
    """Everything that needs no training, for one base. A sequence begins with `prompt_lengths[i]` tokens of prompt."""
    generator = random.Random(f"{base} 2")
    sequences = [random_ids(generator, length) for length in LENGTHS]
    sequences[3][-1] = EOS  # one ends as a finished completion does
    prompt_lengths = [generator.randint(1, length - 1) for length in LENGTHS]
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    prompts = [sequence[:start] for sequence, start in zip(sequences, prompt_lengths, strict=True)]
    return {
        "sequences": sequences,
        "prompt_lengths": prompt_lengths,
        "reference": {"logprobs": _logprobs(plain, sequences)[0], "greedy": _greedy(plain, prompts)},
        "policies": {name: _policy(base, name, sequences, prompts) for name in policies},
        "rewards": {name: _reward(base, name, policies[0], sequences) for name in rewards},
        "texts": _texts(base, rewards[0], generator),
    }


@torch.no_grad()
def _logprobs(model: torch.nn.Module, sequences: list[list[int]]) -> tuple[list[Any], list[Any]]:
    """Logprobs of tokens 1.. and entropies before them, each sequence alone: no padding to be wrong about."""
    logprobs, entropies = [], []
    for sequence in sequences:
        ids = torch.tensor([sequence])
        distribution = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), dim=-1)
        logprobs.append(numbers(distribution.gather(1, ids[0, 1:, None])[:, 0]))
        entropies.append(numbers(-(distribution.exp() * distribution).sum(-1)))
    return logprobs, entropies


@torch.no_grad()
def _greedy(model: torch.nn.Module, prompts: list[list[int]]) -> list[list[int]]:
    completions = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            output_scores=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(output.scores).topk(2).values
        if (margin := float((best[:, 0] - best[:, 1]).min())) < 1e-4:
            raise SystemExit(f"a greedy completion hangs on a margin of {margin}: take another seed")
        completions.append(output.sequences[0, len(prompt) :].tolist())
    return completions


def _policy(base: str, policy: str, sequences: list[list[int]], prompts: list[list[int]]) -> dict[str, Any]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), policy).eval()
    logprobs, entropies = _logprobs(model, sequences)
    with torch.no_grad():
        with_head = load_policy(base, policy).eval()
        values = [numbers(with_head(input_ids=torch.tensor([sequence]))[2][0]) for sequence in sequences]
    return {"logprobs": logprobs, "entropies": entropies, "values": values, "greedy": _greedy(model, prompts)}


def load_policy(base: str, policy: str, **options: Any) -> AutoModelForCausalLMWithValueHead:
    """TRL's model of a policy adapter and its value head, ready to train. No dropout: nobody could repeat its draws."""
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), policy, is_trainable=True)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(adapted, summary_dropout_prob=0.0, **options)
    head = load_file(Path(policy) / "value_head.safetensors")
    model.v_head.load_state_dict({key.removeprefix("v_head."): value for key, value in head.items()})
    return model


@torch.no_grad()
def _reward(base: str, reward: str, policy: str, sequences: list[list[int]]) -> dict[str, Any]:
    """One adapter's scores by transformers, whose answer is the logits, and by TRL, whose answer is one per token."""
    classifier = _classifier(base, reward)
    trl = load_policy(base, policy, reward_adapter=reward)
    lengths = [len(sequence) for sequence in sequences]
    per_token = trl.compute_reward_score(**pad(sequences))[:, :, 0]
    left = trl.compute_reward_score(**pad(sequences, left=True))[:, -1, 0]
    return {
        "right_padded": numbers(classifier(**pad(sequences)).logits[:, 0]),
        "left_padded": numbers(classifier(**pad(sequences, left=True)).logits[:, 0]),
        "alone": [numbers(classifier(**pad([sequence])).logits[0, 0]) for sequence in sequences],
        "trl_token_scores": [numbers(row[:length]) for row, length in zip(per_token, lengths, strict=True)],
        "trl_last_token": [numbers(row[length - 1]) for row, length in zip(per_token, lengths, strict=True)],
        "trl_last_token_left_padded": numbers(left),
    }


def _classifier(base: str, reward: str) -> torch.nn.Module:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    return PeftModel.from_pretrained(model, reward).eval()


@torch.no_grad()
def _texts(base: str, reward: str, generator: random.Random) -> list[dict[str, Any]]:
    """Texts as RewardTrainer tokenizes them: prompt and completion joined, with the end-of-sequence token appended."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    classifier = _classifier(base, reward)
    texts = []
    for prompt_words, completion_words in ((1, 1), (4, 9), (7, 3)):
        prompt = " ".join(f"w{i}" for i in random_ids(generator, prompt_words))
        completion = "".join(f" w{i}" for i in random_ids(generator, completion_words))
        ids = tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"]
        score = numbers(classifier(**pad([ids])).logits[0, 0])
        texts.append({"prompt": prompt, "completion": completion, "tokens": len(ids), "score": score})
    return texts
