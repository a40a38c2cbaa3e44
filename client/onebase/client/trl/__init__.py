"""TRL 0.11.4's multi-adapter PPO, on a onebase server: for scripts whose `compute_reward_score` is gone.

Change the import and the `from_pretrained` line; the rest of the script stays:

    from onebase.client.trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        "127.0.0.1:7070", peft_config=lora_config, reward_adapter="sentiment"
    )
    trainer = PPOTrainer(PPOConfig(batch_size=8, mini_batch_size=8), model, tokenizer=tokenizer)
    responses = trainer.generate(queries, return_prompt=False, do_sample=True, top_k=0, max_new_tokens=32)
    rewards = trainer.model.compute_reward_score(**inputs, ppo_adapter_name="policy_1")
    stats = trainer.step(queries, responses, [row[-1, 0] for row in rewards])

A model's id or directory in place of an address starts a server on this machine (`pip install 'onebase[server]'`).
Tensors go in and come out as torch tensors where torch is installed, and as numpy arrays where it is not.
"""

from onebase.client.trl.model import AutoModelForCausalLMWithValueHead
from onebase.client.trl.trainer import LengthSampler, PPOConfig, PPOTrainer

__all__ = ["AutoModelForCausalLMWithValueHead", "LengthSampler", "PPOConfig", "PPOTrainer"]
