"""A trainer that trains elsewhere: transformers, PEFT and torch in a process of their own; only rollouts are served.

    onebase serve path/to/base
    python examples/train_elsewhere/train.py path/to/base --prompt "The film was" --like good

In every step the server samples completions from the newest version, this process takes a step of REINFORCE on them
(Williams 1992; the baseline is the mean reward of a prompt's completions), and pushes its adapter, which becomes the
server's next version. The two may stand on different machines: nothing but the connection is shared.

One line of JSON for each step: the version that sampled, the mean reward, and how far the server's logprobs are from
this process's own. The last must be rounding alone, or the rollouts would not be those of the policy that is trained.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from onebase.client import Completion, SamplingParams, Session, connect


def reward(text: str, like: str) -> float:
    """How often a completion says what we like. Put your own in its place."""
    return float(text.count(like))


def logprobs(model: PeftModel, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    """The model's logprob of each of a completion's t tokens, [t]."""
    ids = torch.tensor([[*prompt, *completion]])
    before = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(before.float(), dim=-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


def advantages(completions: Sequence[Completion], rewards: Sequence[float]) -> list[float]:
    """Each reward less the mean of those of the same prompt."""
    groups: dict[int, list[float]] = {}
    for one, got in zip(completions, rewards, strict=True):
        groups.setdefault(one.prompt_index, []).append(got)
    means = {prompt: sum(group) / len(group) for prompt, group in groups.items()}
    return [got - means[one.prompt_index] for one, got in zip(completions, rewards, strict=True)]


def push(model: PeftModel, session: Session, name: str) -> int:
    """Makes the adapter as it is now the server's newest version of the policy; which version that is."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return session.upload_adapter(name, folder, replace=True).version


def train(options: argparse.Namespace) -> None:
    """The whole loop."""
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in options.prompt]
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(options.base), lora).eval()  # no dropout anywhere
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.learning_rate)

    with connect(options.server) as client, client.open_session(label=options.name) as session:
        version = push(model, session, options.name)
        for step in range(options.steps):
            sampling = SamplingParams(max_new_tokens=options.max_new_tokens, n=options.n, seed=options.seed + step)
            completions = session.generate(prompts, adapter=options.name, sampling=sampling, logprobs=True)
            assert {one.adapter.version for one in completions} == {version}
            rewards = [reward(one.text, options.like) for one in completions]

            optimizer.zero_grad()
            difference = 0.0
            for one, advantage in zip(completions, advantages(completions, rewards), strict=True):
                own = logprobs(model, prompts[one.prompt_index], one.tokens.tolist())
                difference = max(difference, float((own.detach() - torch.tensor(one.logprobs)).abs().max()))
                (-advantage * own.sum() / len(completions)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

            mean = sum(rewards) / len(rewards)
            print(json.dumps({"version": version, "reward": mean, "difference": difference}), flush=True)
            version = push(model, session, options.name)
    if options.output is not None:
        model.save_pretrained(options.output)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", help="the base that the server serves: a directory or a hub id")
    parser.add_argument("--server", default="127.0.0.1:7070", metavar="HOST:PORT")
    parser.add_argument("--name", default="elsewhere", help="the policy's name on the server")
    parser.add_argument("--prompt", action="append", required=True, help="may be repeated")
    parser.add_argument("--like", required=True, help="text that completions are rewarded for")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--n", type=int, default=16, help="completions of each prompt in a step")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also save the trained adapter here")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
