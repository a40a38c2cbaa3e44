"""What transformers, PEFT and torch say of a case: plain models, one sequence at a time, no line of this project's.

Attention is eager, generation uses no cache, gradients are autograd's, the step is torch.optim.AdamW's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matrix.cases import Case, Targets
from matrix.work import ADAMW, LOSS, MAX_GRAD_NORM, NEW_TOKENS, PASS, PROMPTS, TEXTS, Greedy, Scores, Text, Trained
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

RANK, ALPHA = 3, 6


def make_base(case: Case, place: Path, *, tied: bool) -> None:
    """Writes a case's `base`.

    Raises:
        ValueError: its embeddings are not tied, or untied, as they were asked to be.
    """
    torch.manual_seed(7)
    base = AutoModelForCausalLM.from_config(case.configure(tied=tied), attn_implementation="eager")
    if (base.get_output_embeddings().weight is base.get_input_embeddings().weight) != tied:
        raise ValueError(f"{type(base).__name__} cannot be {'tied' if tied else 'untied'}")
    _shake(base, ("bias", "norm", "ln_"), 0.2)  # they begin as 0 and 1, where leaving them out would not show
    base.save_pretrained(place / "base")
    _tokenizer().save_pretrained(place / "base")


def architecture(place: Path) -> str:
    """The class of the base in a place."""
    name: str = json.loads((place / "base" / "config.json").read_text())["architectures"][0]
    return name


def differs_without(case: Case, setting: str, place: Path) -> float:
    """How much logprobs differ, at most, when a setting of the case's untied base in a place loses its effect."""
    without = case.configure(tied=False, **{setting: case.shows[setting]})
    crippled = AutoModelForCausalLM.from_pretrained(place / "base", config=without, attn_implementation="eager").eval()
    right, wrong = (np.concatenate([_scores(m, text).logprobs for text in TEXTS]) for m in (_causal(place), crippled))
    return float(np.abs(right - wrong).max())


class Plain:
    """A case's base by transformers, with a policy, and a reward where there can be one, by PEFT.

    Writes `policy`, with a value head as TRL saves it, and `reward` beside the base, as PEFT saves them.

    Args:
        case: what to adapt.
        place: where `make_base` wrote the base.
    """

    def __init__(self, case: Case, place: Path) -> None:
        torch.manual_seed(8)
        self._base = _causal(place)
        self._policy = _adapt(_causal(place), place / "policy", "CAUSAL_LM", case.targets)
        _, hidden = _forward(self._base, TEXTS[0].tokens)
        self._head = nn.Linear(hidden.shape[-1], 1)
        heads = {f"v_head.summary.{name}": tensor for name, tensor in self._head.state_dict().items()}
        save_file(heads, place / "policy" / "value_head.safetensors")
        classifier = _classifier(place)
        self._reward = classifier and _adapt(classifier, place / "reward", "SEQ_CLS", case.targets)

    @property
    def has_rewards(self) -> bool:
        """Whether transformers has a sequence classification for the architecture."""
        return self._reward is not None

    def base_scores(self) -> list[Scores]:
        """Of TEXTS, under the base."""
        return [_scores(self._base, text) for text in TEXTS]

    def policy_scores(self) -> list[Scores]:
        """Of TEXTS, under the policy, with values."""
        return [_scores(self._policy, text, self._head) for text in TEXTS]

    @torch.no_grad()
    def rewards(self) -> list[float]:
        """Of TEXTS."""
        return [float(self._reward(input_ids=torch.tensor([text.tokens])).logits) for text in TEXTS]

    def greedy(self, *, adapted: bool) -> list[Greedy]:
        """Completions of PROMPTS by the policy or the base, without a cache."""
        return [_greedy(self._policy if adapted else self._base, prompt) for prompt in PROMPTS]

    def train(self) -> Trained:
        """One PPO pass over PASS and one step of AdamW; the policy is another afterwards."""
        named = {name: p for name, p in self._policy.named_parameters() if p.requires_grad}
        named |= {f"value_head.{name}": p for name, p in self._head.named_parameters()}
        optimizer = torch.optim.AdamW(named.values(), **ADAMW)
        policy_loss, value_loss = _ppo(self._policy, self._head)
        (policy_loss + LOSS["vf_coef"] * value_loss).backward()
        gradients = {_ours(name): _numbers(p.grad) for name, p in named.items() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(named.values(), MAX_GRAD_NORM)
        optimizer.step()
        return Trained(
            losses=np.array([policy_loss.item(), value_loss.item()]),
            gradients=gradients,
            grad_norm=float(norm),
            parameters={_ours(name): _numbers(p) for name, p in named.items()},
            after=self.policy_scores(),
        )


def _ppo(policy: nn.Module, head: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped losses of policy and value, as Schulman et al. 2017 and OpenAI baselines have them, by token."""
    tokens = sum(len(row.advantages) for row in PASS)
    policy_loss = value_loss = torch.zeros(())
    for row in PASS:
        logits, hidden = _forward(policy, row.text.tokens)
        logprobs = _gather(torch.log_softmax(logits, -1), row.text)
        values = head(hidden)[row.text.start - 1 : -1, 0]
        advantages, old, old_values, returns = (
            torch.tensor(x) for x in (row.advantages, row.old_logprobs, row.old_values, row.returns)
        )
        ratio = torch.exp(logprobs - old)
        clipped = ratio.clamp(1 - LOSS["cliprange"], 1 + LOSS["cliprange"])
        policy_loss = policy_loss + torch.max(-advantages * ratio, -advantages * clipped).sum() / tokens
        near = old_values + (values - old_values).clamp(-LOSS["cliprange_value"], LOSS["cliprange_value"])
        worse = torch.max((values - returns) ** 2, (near - returns) ** 2)
        value_loss = value_loss + 0.5 * worse.sum() / tokens
    return policy_loss, value_loss


def _forward(model: nn.Module, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, vocabulary] and last hidden states [T, hidden]."""
    out = model(input_ids=torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
    return out.logits[0], out.hidden_states[-1][0]


def _gather(distribution: torch.Tensor, text: Text) -> torch.Tensor:
    """Of each token of the completion, what stands at the place before it."""
    targets = torch.tensor(text.tokens[text.start :])
    return distribution[text.start - 1 : -1].gather(1, targets[:, None])[:, 0]


@torch.no_grad()
def _scores(model: nn.Module, text: Text, head: nn.Linear | None = None) -> Scores:
    logits, hidden = _forward(model, text.tokens)
    distribution = torch.log_softmax(logits, -1)
    entropy = -(distribution.exp() * distribution).sum(-1)[text.start - 1 : -1]
    values = None if head is None else _numbers(head(hidden)[text.start - 1 : -1, 0])
    return Scores(_numbers(_gather(distribution, text)), _numbers(entropy), values)


@torch.no_grad()
def _greedy(model: Any, prompt: list[int]) -> Greedy:
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        use_cache=False,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = out.sequences[0, len(prompt) :]
    distribution = torch.log_softmax(torch.cat(out.logits), -1)
    return Greedy(tokens.tolist(), _numbers(distribution.gather(1, tokens[:, None])[:, 0]))


def _causal(place: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(place / "base", attn_implementation="eager").eval()


def _classifier(place: Path) -> Any:
    try:
        return AutoModelForSequenceClassification.from_pretrained(
            place / "base", num_labels=1, attn_implementation="eager"
        )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        return None


def _adapt(model: Any, path: Path, task_type: str, targets: Targets) -> Any:
    conv1d = any(isinstance(module, Conv1D) for module in model.modules())
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type=task_type, fan_in_fan_out=conv1d)
    adapted = get_peft_model(model, lora)
    _shake(adapted, ("lora_B", "modules_to_save"), 0.1)
    adapted.save_pretrained(path)
    return adapted.eval()


def _shake(model: nn.Module, parts: tuple[str, ...], spread: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in parts):
                parameter.add_(torch.randn_like(parameter) * spread)


def _tokenizer() -> PreTrainedTokenizerFast:
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(special | {f"w{i}": i for i in range(4, 120)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _ours(name: str) -> str:
    """PEFT's name of a parameter, as the engine says it."""
    return name.removeprefix("base_model.model.").replace(".default.", ".")


def _numbers(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    return tensor.detach().double().clone().numpy()
