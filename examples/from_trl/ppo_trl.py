"""Multi-adapter PPO with TRL 0.11.4: one base, a policy adapter that learns, a reward adapter that judges."""

import argparse
import json

import torch
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True, help="the base model")
    parser.add_argument("--policy", required=True, help="a PEFT adapter of it, to begin from")
    parser.add_argument("--reward", required=True, help="a reward adapter of it")
    parser.add_argument("--prompts", required=True, help="a file with one prompt a line")
    parser.add_argument("--out", default="record.json", help="where the numbers of every step go")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.base, padding_side="right")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        args.policy, is_trainable=True, reward_adapter=args.reward, summary_dropout_prob=0.0
    )
    config = PPOConfig(batch_size=8, mini_batch_size=4, ppo_epochs=2, learning_rate=1e-3, seed=0)
    trainer = PPOTrainer(config, model, tokenizer=tokenizer)

    with open(args.prompts, encoding="utf-8") as file:
        prompts = [torch.tensor(tokenizer(line.strip())["input_ids"]) for line in file]
    record = []
    for start in range(0, len(prompts), config.batch_size):
        queries = prompts[start : start + config.batch_size]
        responses = trainer.generate(
            queries,
            batch_size=config.batch_size,
            return_prompt=False,
            do_sample=False,  # greedy, so that two runs can be compared; PPO wants True, with top_k=0
            max_new_tokens=12,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = [torch.cat(pair).tolist() for pair in zip(queries, responses, strict=True)]
        inputs = tokenizer.pad({"input_ids": texts}, return_tensors="pt")
        last = inputs["attention_mask"].sum(1) - 1
        scores = trainer.model.compute_reward_score(**inputs)
        rewards = [scores[i, last[i], 0] for i in range(len(queries))]
        with torch.no_grad():
            logits, _, values = trainer.model(**inputs)
            with trainer.model.pretrained_model.disable_adapter():
                reference_logits, _, _ = trainer.model(**inputs)
        stats = trainer.step(queries, responses, rewards)
        batch = {"query": tokenizer.batch_decode(queries), "response": tokenizer.batch_decode(responses)}
        trainer.log_stats(stats, batch, rewards)
        real = inputs["attention_mask"][:, 1:].bool()
        record.append(
            {
                "responses": [response.tolist() for response in responses],
                "rewards": [float(reward) for reward in rewards],
                "logprobs": logprobs(logits, inputs["input_ids"])[real].tolist(),
                "reference_logprobs": logprobs(reference_logits, inputs["input_ids"])[real].tolist(),
                "values": values[inputs["attention_mask"].bool()].tolist(),
                "stats": {name: value for name, value in stats.items() if isinstance(value, float)},
            }
        )
        print(f"step {len(record)}: mean reward {sum(record[-1]['rewards']) / len(rewards):.3f}")
    with open(args.out, "w", encoding="utf-8") as file:
        json.dump(record, file)


def logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Of every token but the first, [B, T - 1]."""
    return torch.log_softmax(logits[:, :-1].float(), dim=-1).gather(2, ids[:, 1:, None])[..., 0]


if __name__ == "__main__":
    main()
