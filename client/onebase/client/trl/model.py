"""TRL's AutoModelForCausalLMWithValueHead, whose model is on a server."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onebase.client import types as t
from onebase.client.channel import tls_of
from onebase.client.client import Client, connect
from onebase.client.errors import AlreadyExistsError
from onebase.client.trl.arrays import Array, Batch, draw_seed, pad_rows, read_batch
from onebase.client.trl.generation import read_generation
from onebase.client.trl.local import LocalServer, is_address
from onebase.client.trl.lora import lora_spec

_IGNORED = {
    *("device_map", "token", "use_auth_token", "is_trainable", "low_cpu_mem_usage", "attn_implementation"),
    *("summary_dropout_prob", "use_cache", "revision", "cache_dir"),
}
"""Arguments of TRL's from_pretrained that mean nothing to a model that is somewhere else."""

_OF_TOKENIZERS = {"token_type_ids", "position_ids", "labels"}
"""What tokenizers and collators add to a batch; the server works positions out itself."""


class AutoModelForCausalLMWithValueHead:
    """A policy with a value head on a server's base, beside its reward adapter; `from_pretrained` makes one.

    It is a session of its own: nobody else trains its policies while it lives. Closes itself at the end of a `with`
    block; a script may as well just end.

    Attributes:
        client: the connection to the server.
        session: the lease on the policies.
        rm_adapter_name: the reward adapter, or "" without one.
    """

    is_peft_model = True

    def __init__(
        self,
        client: Client,
        reward: str = "",
        server: LocalServer | None = None,
        *,
        return_logits: bool = False,
    ) -> None:
        """Begins a session on a server that is reached already; scripts use `from_pretrained`."""
        self.client = client
        self.session = client.open_session(label="trl")
        self.rm_adapter_name = reward
        self._server = server
        self._return_logits = return_logits
        self._disabled = False
        self._base = client.info().base

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | Client,
        *,
        peft_config: Any = None,
        reward_adapter: str | os.PathLike[str] | None = None,
        reward_adapter_name: str = "",
        ppo_adapter_name: str = "default",
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        torch_dtype: Any = None,
        seed: int | None = None,
        return_logits: bool = False,
        **ignored: Any,
    ) -> AutoModelForCausalLMWithValueHead:
        """A policy on a server's base.

        Args:
            pretrained_model_name_or_path: "host:port" of a server that runs (ONEBASE_TOKEN and ONEBASE_TLS_CA say who
                asks); a `Client`; or a model's id or directory, for which a server is started on this machine that
                ends with the program.
            peft_config: a LoraConfig, which makes a fresh policy; or a PEFT directory to begin from. Without it the
                policy `ppo_adapter_name` must be on the server, and goes on from where it is.
            reward_adapter: the name of a reward adapter on the server, or a PEFT directory.
            reward_adapter_name: its name there, if it is a directory; "" makes one of its contents' hash, so that the
                same reward model is loaded once.
            ppo_adapter_name: the policy's name on the server, where others may train theirs.
            load_in_8bit: the base's layers are kept in int8; a server that runs must have been started so.
            load_in_4bit: the same for nf4.
            torch_dtype: what the base is loaded in, where a server is started: a torch dtype or its name.
            seed: of the fresh policy and its value head; None draws one from the global random state.
            return_logits: the model, when called, gives logits as TRL's does, not logprobs; they are large.
            **ignored: arguments of TRL's that mean nothing here (device_map, token, ...).

        Raises:
            ValueError: an argument that is not supported.
            AlreadyExistsError: a fresh policy of a name that is taken.
            OnebaseError: what else the server refuses.
        """
        unknown = sorted(set(ignored) - _IGNORED - {"quantization_config"})
        if unknown:
            raise ValueError(f"from_pretrained({unknown[0]}=...) is not supported")
        quantization = _quantization(load_in_8bit, load_in_4bit, ignored.get("quantization_config"))
        server = None
        if isinstance(pretrained_model_name_or_path, Client):
            client = pretrained_model_name_or_path
        else:
            target = os.fspath(pretrained_model_name_or_path)
            if not is_address(target):
                flags = ["--quantization", quantization]
                if torch_dtype is not None:
                    flags += ["--dtype", str(torch_dtype).removeprefix("torch.")]
                server = LocalServer(target, flags)
                target = server.address
            authority = tls_of(os.environ.get("ONEBASE_TLS_CA", "")) if server is None else None
            client = connect(target, token=os.environ.get("ONEBASE_TOKEN", ""), tls=authority)
        _check_quantization(client, quantization)
        reward = "" if reward_adapter is None else _reward(client, os.fspath(reward_adapter), reward_adapter_name)
        model = cls(client, reward, server, return_logits=return_logits)
        try:
            if peft_config is not None:
                model.add_adapter(ppo_adapter_name, peft_config, seed=seed)
            model.set_adapter(ppo_adapter_name)
        except BaseException:
            model.close()
            raise
        return model

    # ------------------------------------------------------------------------------------------------- adapters

    def add_adapter(self, adapter_name: str, peft_config: Any, *, seed: int | None = None) -> None:
        """Makes another policy: fresh from a LoraConfig, or from a PEFT directory. It does not become active."""
        seed = draw_seed() if seed is None else seed
        try:
            if isinstance(peft_config, str | os.PathLike):
                _bring(self.session, adapter_name, Path(peft_config), "policy", value_head=True, seed=seed)
            else:
                self.session.create_adapter(adapter_name, lora_spec(peft_config), value_head=True, seed=seed)
        except AlreadyExistsError as error:
            raise AlreadyExistsError(
                f"there is a policy {adapter_name!r} on the server: choose another ppo_adapter_name, or leave out "
                "peft_config to go on with that one",
                reason=error.reason,
                field="ppo_adapter_name",
            ) from None

    def set_adapter(self, adapter_name: str) -> None:
        """Makes a policy the one that is sampled, scored and trained, and takes its lease."""
        self.session.set_active(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within it the model is the base with no adapter: the reference. It has no values."""
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

    @property
    def policy_adapter_name(self) -> str:
        """The policy that is sampled, scored and trained: the session's active adapter."""
        return self.session.ppo_adapter_name

    @property
    def supports_rm_adapter(self) -> bool:
        """Whether there is a reward adapter."""
        return bool(self.rm_adapter_name)

    @property
    def pretrained_model(self) -> AutoModelForCausalLMWithValueHead:
        """This object: scripts say `model.pretrained_model.disable_adapter()`."""
        return self

    # -------------------------------------------------------------------------------------------------- numbers

    def compute_reward_score(
        self, input_ids: Array, attention_mask: Array = None, ppo_adapter_name: str = "", **others: Any
    ) -> Array:
        """The reward adapter's scores at every token, float32 [B, T, num_labels].

        Behind a row's last real token its score is repeated, so `scores[:, -1]` is right under right padding too,
        where TRL gave the score of a padding token. In front of a row there are zeros.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 1 for real tokens; padding on the left or on the right.
            ppo_adapter_name: the policy that is active afterwards, whatever happens; "" leaves it as it is.
            **others: position_ids and the like, which are not needed.

        Raises:
            ValueError: there is no reward adapter.
        """
        _check_others("compute_reward_score", others)
        if not self.supports_rm_adapter:
            raise ValueError("this model has no reward adapter; give from_pretrained a reward_adapter")
        batch = read_batch(input_ids, attention_mask)
        labels = self.client.adapter(self.rm_adapter_name).num_labels
        terms = [t.RewardTerm(self.rm_adapter_name, label=label) for label in range(labels)]
        rewards = self.session.reward(
            _whole(batch), terms, append_eos=False, per_token=True, ppo_adapter_name=ppo_adapter_name
        )
        scores = [np.stack(list((reward.token_scores or {}).values()), axis=-1) for reward in rewards]
        return batch.padded(scores, hold_last=True)

    def __call__(
        self, input_ids: Array, attention_mask: Array = None, *, return_logits: bool | None = None, **others: Any
    ) -> tuple[Array, None, Array]:
        """What the policy says of a batch: (logprobs, None, values).

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 1 for real tokens.
            return_logits: give logits [B, T, vocabulary] as TRL does, in place of logprobs; None is what
                `from_pretrained` was told. They are large, and few programs need more of them than the logprobs.
            **others: position_ids and the like, which are not needed.

        Returns:
            Logprobs [B, T - 1] of the tokens from the second on, at temperature 1; None, where TRL has a loss; and
            values [B, T], or None where the adapters are disabled. Padded places hold zeros.
        """
        _check_others("the model", others)
        return_logits = self._return_logits if return_logits is None else return_logits
        batch = read_batch(input_ids, attention_mask)
        # A last token that nobody looks at, for the value and the logits after the row's own last one.
        sequences = [t.Sequence(row[:1], np.append(row[1:], 0)) for row in batch.rows]
        found = self.session.logprob(sequences, adapter=self._adapter, values=not self._disabled, logits=return_logits)
        values = None if self._disabled else batch.padded([_there(one.values) for one in found])
        if return_logits:
            return batch.padded([_there(one.logits) for one in found]), None, values
        shifted = Batch([row[1:] for row in batch.rows], batch.starts, batch.width - 1, batch.like)
        return shifted.padded([one.logprobs[:-1] for one in found]), None, values

    forward = __call__

    def generate(self, input_ids: Array, attention_mask: Array = None, **generation_kwargs: Any) -> Array:
        """Completions of prompts [B, T], as transformers gives them: [B * num_return_sequences, T + new], padded right.

        Args:
            input_ids: [B, T], padded on the left if at all.
            attention_mask: [B, T].
            **generation_kwargs: of transformers' generate, with its defaults: greedy without do_sample, and with it
                top_k=50. Without a `seed`, one is drawn from the global random state.

        Raises:
            ValueError: an argument that is not supported.
        """
        batch = read_batch(input_ids, attention_mask)
        asked = read_generation(generation_kwargs, width=batch.width, seed=draw_seed())
        completions = self.session.generate(list(batch.rows), adapter=self._adapter, sampling=asked.sampling)
        pad_id = asked.pad_token_id
        if pad_id is None:
            pad_id = self._base.pad_token_id
        if pad_id is None:
            pad_id = next(iter(self._base.eos_token_ids), 0)
        prompts = read_batch(input_ids).rows  # padding included
        whole: list[NDArray[np.int64]] = [
            np.concatenate((prompts[one.prompt_index], one.tokens)) for one in completions
        ]
        return pad_rows(whole, int(pad_id), input_ids)

    @property
    def _adapter(self) -> str:
        return t.BASE if self._disabled else self.policy_adapter_name

    # --------------------------------------------------------------------------------------------------- the rest

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes the policy here as a PEFT directory, with its value head."""
        self.client.download_adapter(self.policy_adapter_name, save_directory)

    def eval(self) -> AutoModelForCausalLMWithValueHead:
        """Nothing to do: the server never has dropout on."""
        return self

    def train(self, mode: bool = True) -> AutoModelForCausalLMWithValueHead:  # noqa: ARG002
        """Nothing to do: the server never has dropout on."""
        return self

    def to(self, *_: Any, **__: Any) -> AutoModelForCausalLMWithValueHead:
        """Nothing to do: the model is where the server is."""
        return self

    def close(self) -> None:
        """Gives the policies back and hangs up; ends the server if it was started here. May be called twice."""
        self.session.close()
        if self._server is not None:
            self.client.close()
            self._server.close()

    def __enter__(self) -> AutoModelForCausalLMWithValueHead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        reward = f", rewards by {self.rm_adapter_name!r}" if self.supports_rm_adapter else ""
        return f"<{type(self).__name__} {self.policy_adapter_name!r} of {self.client!r}{reward}>"


def _whole(batch: Batch) -> list[t.Sequence]:
    """Rows as completions without a prompt, as rewards take them."""
    return [t.Sequence((), row) for row in batch.rows]


def _there(numbers: t.Floats | None) -> t.Floats:
    if numbers is None:
        raise TypeError("the server left out numbers that were asked for")
    return numbers


def _check_others(where: str, others: Mapping[str, Any]) -> None:
    unknown = sorted(set(others) - _OF_TOKENIZERS)
    if unknown:
        raise ValueError(f"{where} does not take {unknown[0]}; it takes input_ids and attention_mask")


def _quantization(eight: bool, four: bool, config: Any) -> str:
    """What --quantization is to be."""
    eight = eight or bool(getattr(config, "load_in_8bit", False))
    four = four or bool(getattr(config, "load_in_4bit", False))
    if eight and four:
        raise ValueError("load_in_8bit and load_in_4bit are both set; choose one")
    return "int8" if eight else "nf4" if four else "none"


def _check_quantization(client: Client, wanted: str) -> None:
    base = client.info().base
    if base.quantization != wanted and wanted != "none":
        raise ValueError(
            f"load_in_{'8' if wanted == 'int8' else '4'}bit is set, and the server keeps {base.model!r} in "
            f"{base.dtype if base.quantization == 'none' else base.quantization}: start it with --quantization "
            f"{wanted}, or leave this out"
        )


def _reward(client: Client, given: str, name: str) -> str:
    """The name of the reward adapter on the server, which is loaded if it is a directory."""
    there = {adapter.name for adapter in client.adapters("reward")}
    path = Path(given)
    if not path.is_dir():
        if given not in there:
            known = ", ".join(sorted(there)) or "none"
            raise ValueError(
                f"reward_adapter={given!r} is no directory and no reward adapter of the server, which has: {known}"
            )
        return given
    if not name:
        weights = path / "adapter_model.safetensors"
        content = weights.read_bytes() if weights.is_file() else b""
        name = f"{path.resolve().name}-{hashlib.sha256(content).hexdigest()[:8]}"
        if name in there:
            return name
    elif name in there:
        raise ValueError(
            f"the server has a reward adapter {name!r}: use it with reward_adapter={name!r}, or choose another "
            "reward_adapter_name"
        )
    _bring(client, name, path, "reward")
    return name


def _bring(
    to: Any, name: str, path: Path, kind: t.AdapterKind, *, value_head: bool = False, seed: int = 0
) -> t.Adapter:
    """Loads a PEFT directory of this machine, or, if there is none, one of the server's."""
    load = to.upload_adapter if path.is_dir() else to.load_adapter
    adapter: t.Adapter = load(name, path, kind=kind, value_head=value_head, seed=seed)
    return adapter
