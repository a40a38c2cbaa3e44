"""TRL 0.11.4's PPOTrainer over a server: the same calls, the same numbers, the same names in the statistics."""

from __future__ import annotations

import importlib
import random
import warnings
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from onebase.client import types as t
from onebase.client.trl.arrays import Array, Sampler, draw_seed, give, to_numpy, torch
from onebase.client.trl.generation import read_generation
from onebase.client.trl.model import AutoModelForCausalLMWithValueHead

if TYPE_CHECKING:
    from onebase.trainer.algorithms import PpoStepper

COLUMNS = ("input_ids", "attention_mask", "label", "query", "response")
"""Columns of a data set that a batch keeps."""


@dataclass
class PPOConfig:
    """TRL 0.11.4's PPOConfig: its names and its defaults.

    What TRL needed for a model in its own process (forward_batch_size, optimize_cuda_cache, gradient_checkpointing and
    the like) is taken and means nothing here; the server's own options are `onebase serve --help`.
    """

    exp_name: str = "ppo"
    seed: int = 0
    log_with: str | None = None
    task_name: str | None = None
    model_name: str = "gpt2"
    query_dataset: str = ""
    reward_model: str = ""
    remove_unused_columns: bool = True
    tracker_kwargs: dict[str, Any] = field(default_factory=dict)
    accelerator_kwargs: dict[str, Any] = field(default_factory=dict)
    project_kwargs: dict[str, Any] = field(default_factory=dict)
    tracker_project_name: str = "trl"
    steps: int = 20000
    learning_rate: float = 1.41e-5
    adap_kl_ctrl: bool = True
    init_kl_coef: float = 0.2
    kl_penalty: str = "kl"
    target: float = 6.0
    horizon: float = 10000.0
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    batch_size: int = 128
    forward_batch_size: int | None = None
    mini_batch_size: int = 128
    gradient_accumulation_steps: int = 1
    ppo_epochs: int = 4
    max_grad_norm: float | None = None
    optimize_cuda_cache: bool | None = None
    optimize_device_cache: bool = False
    early_stopping: bool = False
    target_kl: float = 1.0
    ratio_threshold: float = 10.0
    use_score_scaling: bool = False
    use_score_norm: bool = False
    score_clip: float | None = None
    whiten_rewards: bool = False
    gradient_checkpointing: bool = False
    dataset_num_proc: int | None = None

    def __post_init__(self) -> None:
        if self.forward_batch_size is not None:  # as TRL has it
            self.mini_batch_size = self.forward_batch_size
        self.backward_batch_size = self.mini_batch_size * self.gradient_accumulation_steps
        if self.batch_size % self.backward_batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of mini_batch_size * gradient_accumulation_steps = "
                f"{self.mini_batch_size} * {self.gradient_accumulation_steps}; set all three together"
            )
        self.total_ppo_epochs = -(-self.steps // self.batch_size)

    def to_dict(self) -> dict[str, Any]:
        """The settings by name."""
        return dict(vars(self))


class LengthSampler:
    """Draws a length in [min_value, max_value), from numpy's global random state, as TRL's does."""

    def __init__(self, min_value: int, max_value: int) -> None:
        self.values = list(range(min_value, max_value))

    def __call__(self) -> int:
        """A length."""
        return int(np.random.choice(self.values))


class PPOTrainer:
    """Trains the policy of a model with PPO, a batch at a time.

    Attributes:
        config: its settings.
        model: the model it trains.
        tokenizer: for the ids that pad and end.
        dataloader: batches of the data set, if there is one.
        accelerator: what scripts ask of accelerate's: device, num_processes, is_main_process.
        current_device: where tensors are expected: "cpu".
    """

    def __init__(
        self,
        config: PPOConfig | None = None,
        model: AutoModelForCausalLMWithValueHead | None = None,
        ref_model: str | None = None,
        tokenizer: Any = None,
        dataset: Any = None,
        optimizer: Any = None,
        data_collator: Callable[..., Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: Any = None,
        training_data_collator: Any = None,
    ) -> None:
        """Seeds the global random states with config.seed, as TRL does.

        Args:
            config: PPO's settings.
            model: of this module's `from_pretrained`.
            ref_model: None is the base with the adapters off; or the name of a frozen adapter on the server.
            tokenizer: has pad_token_id and eos_token_id.
            dataset: a datasets.Dataset or a torch data set, of which `dataloader` gives batches; needs torch.
            optimizer: not supported: the server has Adam, with config.learning_rate.
            data_collator: makes a batch of the data set's rows.
            num_shared_layers: means nothing: the reference shares all layers.
            lr_scheduler: not supported: set `config.learning_rate` between steps.
            training_data_collator: means nothing: batches are not padded.

        Raises:
            ValueError: an argument that is not supported.
        """
        del num_shared_layers, training_data_collator
        if not isinstance(model, AutoModelForCausalLMWithValueHead):
            raise ValueError(f"model is a {type(model).__name__}; make it with this module's from_pretrained")
        if ref_model is not None and not isinstance(ref_model, str):
            raise ValueError(
                f"ref_model is a {type(ref_model).__name__}; None is the base with the adapters off, and a frozen "
                "adapter on the server is given by its name"
            )
        if optimizer is not None or lr_scheduler is not None:
            raise ValueError(
                "optimizer and lr_scheduler are not supported, because the optimizer is the server's Adam: set "
                "config.learning_rate, before a step if it is to change"
            )
        self.config = config or PPOConfig()
        _set_seed(self.config.seed)
        self.model = model
        self.ref_model = ref_model
        self.tokenizer = tokenizer
        self.current_device: Any = "cpu" if torch() is None else torch().device("cpu")
        self.accelerator = SimpleNamespace(
            device=self.current_device,
            num_processes=1,
            process_index=0,
            is_main_process=True,
            is_local_main_process=True,
            unwrap_model=lambda model: model,
        )
        self.dataset = dataset
        self.dataloader = None if dataset is None else self.prepare_dataloader(dataset, data_collator)
        self.current_step = 0
        self._trackers = _trackers(self.config)
        self._stepper = self._new_stepper()

    @property
    def kl_ctl(self) -> SimpleNamespace:
        """The KL controller: `kl_ctl.value` is the coefficient of the next step."""
        return SimpleNamespace(value=self._stepper.kl_coef)

    def prepare_dataloader(self, dataset: Any, data_collator: Callable[..., Any] | None = None) -> Any:
        """A torch DataLoader of whole, shuffled batches.

        Raises:
            ImportError: torch is not installed.
        """
        if torch() is None:
            raise ImportError("a dataset needs torch; install it, or make the batches yourself")
        if self.config.remove_unused_columns and hasattr(dataset, "column_names"):
            dataset = dataset.remove_columns([name for name in dataset.column_names if name not in COLUMNS])
        loader = importlib.import_module("torch.utils.data").DataLoader
        return loader(
            dataset, batch_size=self.config.batch_size, collate_fn=data_collator, shuffle=True, drop_last=True
        )

    # ------------------------------------------------------------------------------------------------- generate

    def generate(
        self,
        query_tensor: Array | list[Array],
        length_sampler: Sampler | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Completes one query [T], or several.

        Args:
            query_tensor: token ids of a query, or a list of them.
            length_sampler: draws max_new_tokens, once for every `batch_size` queries, as in TRL.
            batch_size: see length_sampler; the server batches by itself.
            return_prompt: give the query with its response.
            generate_ref_response: also give responses of the reference.
            **generation_kwargs: of transformers' generate.

        Returns:
            For a list of queries, a list of responses, each cut behind its first end-of-sequence token; for one query,
            a tensor [1, T]. With generate_ref_response, a pair of these.
        """
        single = not isinstance(query_tensor, list)
        queries = [query_tensor] if single else query_tensor
        if single and np.ndim(to_numpy(query_tensor)) != 1:
            raise ValueError(f"query_tensor has shape {list(np.shape(to_numpy(query_tensor)))}; give one query [T]")
        size = max(1, min(len(queries), batch_size))
        parts = [queries[start : start + size] for start in range(0, len(queries), size)]
        lengths = [None if length_sampler is None else length_sampler() for _ in parts]
        own = self._complete(self.model.policy_adapter_name, parts, lengths, return_prompt, generation_kwargs)
        found = give(to_numpy(own[0])[None], query_tensor) if single else own
        if not generate_ref_response:
            return found
        ref = self._complete(self.ref_model or t.BASE, parts, lengths, return_prompt, generation_kwargs)
        return found, give(to_numpy(ref[0])[None], query_tensor) if single else ref

    def _complete(
        self,
        adapter: str,
        parts: SequenceABC[list[Array]],
        lengths: SequenceABC[int | None],
        return_prompt: bool,
        kwargs: Mapping[str, Any],
    ) -> list[Array]:
        responses: list[Array] = []
        for part, length in zip(parts, lengths, strict=True):
            rows = [to_numpy(query) for query in part]
            asked = {**kwargs} if length is None else {**kwargs, "max_new_tokens": length}
            width = max(len(row) for row in rows)
            sampling = read_generation(asked, width=width, seed=draw_seed()).sampling
            completions = self.model.session.generate(rows, adapter=adapter, sampling=sampling)
            for query, one in zip(part, completions, strict=True):
                tokens = self._to_first_end(one.tokens)
                whole = np.concatenate((to_numpy(query), tokens)) if return_prompt else tokens
                responses.append(give(whole.astype(np.int64), query))
        return responses

    def _to_first_end(self, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        """Tokens up to the tokenizer's first end-of-sequence token, also where generation went on behind it."""
        places = np.flatnonzero(tokens == getattr(self.tokenizer, "eos_token_id", None))
        return tokens[: places[0] + 1] if places.size else tokens

    # ----------------------------------------------------------------------------------------------------- step

    def step(
        self,
        queries: SequenceABC[Array],
        responses: SequenceABC[Array],
        scores: SequenceABC[Array],
        response_masks: SequenceABC[Array] | None = None,
    ) -> dict[str, Any]:
        """One PPO step on a batch, with minibatches in the order of numpy's global random state, as in TRL.

        Args:
            queries: token ids of each query, batch_size of them.
            responses: token ids of each response.
            scores: the reward of each response, a number or a tensor of one.
            response_masks: for each response, which of its tokens count.

        Returns:
            TRL's statistics, by TRL's names.

        Raises:
            ValueError: lengths that do not fit together, an empty response, or a score that is not finite.
        """
        for name, given in (("queries", queries), ("responses", responses), ("scores", scores)):
            if not isinstance(given, list | tuple):
                raise ValueError(f"{name} is a {type(given).__name__}; give a list with an entry for each query")
        numbers = [to_numpy(score) for score in scores]
        for index, score in enumerate(numbers):
            if score.size != 1:
                raise ValueError(f"scores[{index}] has shape {list(score.shape)}; give one number for each response")
        self._follow_settings()
        masks = None if response_masks is None else [to_numpy(mask).astype(bool) for mask in response_masks]
        stats: dict[str, Any] = self._stepper.step(
            [to_numpy(query) for query in queries],
            [to_numpy(response) for response in responses],
            [float(score.reshape(())) for score in numbers],
            masks,
        )
        if stats["objective/kl"] < -1.0:
            warnings.warn(
                f"the KL divergence is negative ({stats['objective/kl']:.2f}): completions were not drawn from the "
                "policy itself; set top_k=0, top_p=1 and temperature=1",
                stacklevel=2,
            )
        return stats

    def _new_stepper(self) -> PpoStepper:
        from onebase.trainer.algorithms import PpoStepper
        from onebase.trainer.hyperparameters import PpoConfig

        names = {one.name for one in fields(PpoConfig)}
        return PpoStepper(
            self.model.session,
            PpoConfig(**{name: value for name, value in self.config.to_dict().items() if name in names}),
            reference=self.ref_model or t.BASE,
            adapter=self.model.policy_adapter_name,
            rng=_GlobalRandom(),
        )

    def _follow_settings(self) -> None:
        """Takes over settings and an active policy that the script has changed since the last step."""
        fresh, old = self._new_stepper(), self._stepper
        fresh.kl_coef, fresh.moments, fresh.version = old.kl_coef, old.moments, old.version
        self._stepper = fresh

    # ----------------------------------------------------------------------------------------------------- logs

    def log_stats(
        self,
        stats: Mapping[str, Any],
        batch: Mapping[str, Any],
        rewards: SequenceABC[Array],
        columns_to_log: Iterable[str] = ("query", "response"),
    ) -> dict[str, Any]:
        """Hands a step's statistics and rewards to the tracker of config.log_with, if there is one.

        Returns:
            What was logged: the stats, and env/reward_{mean,std,dist}.
        """
        from onebase.trainer.stats import reward_stats

        missing = [column for column in columns_to_log if column not in batch]
        if missing and self.config.log_with == "wandb":
            raise ValueError(f"the batch has no column {missing[0]!r} to log; it has {', '.join(batch)}")
        numbers = np.array([float(to_numpy(reward).reshape(())) for reward in rewards])
        logs = {**stats, **reward_stats(numbers)}
        self.current_step += 1
        if self._trackers is not None:
            self._trackers.log({name: _loggable(value) for name, value in logs.items()}, step=self.current_step)
        return logs

    def save_pretrained(self, save_directory: str) -> None:
        """Writes the policy with its value head, and the tokenizer, to a directory here."""
        self.model.save_pretrained(save_directory)
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(str(Path(save_directory)))


class _GlobalRandom(np.random.Generator):
    """Permutations from numpy's global random state: a script that seeds it repeats itself, and does as TRL does."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))

    def permutation(self, x: Any, axis: int = 0) -> Any:  # noqa: ARG002
        return np.random.permutation(x)


def _set_seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    if torch() is not None:
        torch().manual_seed(seed)


def _trackers(config: PPOConfig) -> Any:
    """accelerate's trackers (TensorBoard, Weights & Biases, ...), or None where nobody asked for one."""
    if config.log_with is None:
        return None
    try:
        accelerate = importlib.import_module("accelerate")
    except ImportError as error:
        raise ImportError(f"log_with={config.log_with!r} needs accelerate; install it") from error
    project = importlib.import_module("accelerate.utils").ProjectConfiguration(**config.project_kwargs)
    accelerator = accelerate.Accelerator(log_with=config.log_with, project_config=project, **config.accelerator_kwargs)
    settings = {name: value for name, value in config.to_dict().items() if isinstance(value, int | float | str | bool)}
    accelerator.init_trackers(config.tracker_project_name, config=settings, init_kwargs=config.tracker_kwargs)
    return accelerator


def _loggable(value: Any) -> Any:
    return value if np.ndim(value) == 0 else float(np.mean(value))
