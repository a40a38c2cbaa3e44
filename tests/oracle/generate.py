"""Makes the fixtures of this directory: what transformers, PEFT and TRL 0.11.4 answer, to hold the server to.

Run by `make oracle` in an environment of its own (requirements.txt). The same versions give the same files, so that a
difference in git is a difference in one of the three libraries.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from generate_from_trl import from_trl_oracle  # noqa: E402
from generate_models import make_adapters, make_bases  # noqa: E402
from generate_ppo import SCENARIOS, ppo_oracle  # noqa: E402
from generate_scores import score_oracle  # noqa: E402
from transformers.utils import logging  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    shutil.rmtree(FIXTURES, ignore_errors=True)
    FIXTURES.mkdir()
    os.chdir(FIXTURES)  # so that the paths which PEFT writes down are relative: "base"
    make_bases()
    make_adapters()
    scores = {
        "base": score_oracle("base", rewards=["reward", "reward_2"], policies=["policy", "policy_all"]),
        "base_gpt2": score_oracle("base_gpt2", rewards=["reward_gpt2"], policies=["policy_gpt2"]),
    }
    Path("scores.json").write_text(json.dumps(scores) + "\n")
    for scenario in SCENARIOS:
        ppo_oracle("base", "policy", scenario)
    from_trl_oracle("base", "policy", "reward")


if __name__ == "__main__":
    main()
