"""The `onebase train` command: reads a configuration, trains, and says what cannot be used in one line.

What the server refuses, and a missing extra, `onebase` itself says. Nothing heavy is imported at the top, so that
`onebase --help` is quick.
"""

from __future__ import annotations

from typing import Annotated

import typer

from onebase.client.terminal import print_error

EXAMPLE = """\
server: 127.0.0.1:7070         # where `onebase serve` listens
policy:                        # made, with a value head, if it is not there
  name: policy_1
  rank: 16
  alpha: 32
  target_modules: all-linear
algorithm: ppo                 # ppo, grpo, rloo, reinforce_pp, sft, dpo
reference: base                # or the name of a frozen adapter
prompts:
  path: prompts.jsonl          # .jsonl .json .csv .parquet, directory, hub id
  column: prompt               # texts, or lists of token ids
eval_prompts:                  # optional: held-out prompts
  path: eval.jsonl
eval: {every: 10, samples: 32, seed: 1234}
rewards:                       # adapters on the server, summed by weight
  - {adapter: sentiment, weight: 1.0}     # label: 2, of a head with several
# reward_function: my.py:f     # f(prompts, completions, **columns) -> numbers
# reward_function_weight: 1.0
# append_eos: true             # unset: as the reward adapters declare, or yes
generation:                    # to train on: no filters, temperature 1
  max_new_tokens: 32
  temperature: 1.0
  top_k: 0
  top_p: 1.0
ppo:                           # names and defaults of TRL 0.11.4's PPOConfig
  learning_rate: 1.41e-5
  batch_size: 128
  mini_batch_size: 32
  gradient_accumulation_steps: 1
  ppo_epochs: 4
  init_kl_coef: 0.2
  adap_kl_ctrl: true
  target: 6
# grpo: {num_generations: 8, beta: 0.05, learning_rate: 1e-5}
steps: 100
seed: 0
output_dir: runs/policy_1      # metrics, samples, summary, TensorBoard, state
save_every: 20                 # 0: only at the end and when interrupted
resume: auto                   # auto, never or must
log: {tensorboard: true, samples: 2}
"""
"""A configuration with every part that a first run may want; no line too long for a terminal."""

HELP = f"""Train a policy with PPO, GRPO, RLOO, REINFORCE++, SFT or DPO.

CONFIG is a YAML file. Any of its keys can be set by a flag of its dotted
name, whose value is YAML:

\b
    onebase train c.yaml --ppo.learning_rate 1e-4 --rewards.0.weight -1

SIGINT and SIGTERM end the run after its current step, saved; the same command
goes on from there. Paths are relative to the current directory.

A server's token comes from ONEBASE_TOKEN alone; the certificates that it is
known by from the key tls_ca, or ONEBASE_TLS_CA.

A complete example of CONFIG:

\b
{EXAMPLE}"""


train = typer.Typer(add_completion=False, rich_markup_mode="rich")


@train.command(help=HELP, context_settings={"ignore_unknown_options": True})
def run(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG [--KEY VALUE]", help="A YAML file, and settings over it.", show_default=False),
    ],
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print all settings, defaults included, and do nothing else.")
    ] = False,
) -> None:
    """Reads the settings, and trains."""
    import yaml

    from onebase.trainer import loading, loop
    from onebase.trainer.parsing import ConfigError, plain, split_arguments

    try:
        path, flags = split_arguments(arguments)
        settings = loading.load_config(path, flags)
        if print_config:
            typer.echo(yaml.safe_dump(plain(settings), sort_keys=False, allow_unicode=True), nl=False)
            return
        summary = loop.train(settings)
    except ConfigError as error:
        print_error(str(error))
        raise typer.Exit(1) from None
    if summary is not None and summary["reward_before"] is not None:
        typer.echo(f"reward {summary['reward_before']:+.4f} before, {summary['reward_after']:+.4f} after")
