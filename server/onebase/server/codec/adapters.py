"""Adapters: requests to make, load and save them, and an adapter as a message."""

from __future__ import annotations

import re
from pathlib import Path

from onebase.server import patterns
from onebase.server.catalog import LoadedAdapter, NewAdapter, SavedAdapter
from onebase.server.codec.fields import integer, number, out_of_range, required
from onebase.server.config import Limits
from onebase.server.errors import InvalidArgument, ResourceExhausted
from onebase.server.identity import OPERATOR, caller
from onebase.server.jobs import AdapterFacts, AdapterKind, ClientState, LoraSpec, Pooling, SaveResult
from onebase.server.names import BASE_NAME, check_name, check_new_name
from onebase.server.registry import Entry
from onebase.v1 import adapters_pb2, types_pb2

_KINDS = {
    types_pb2.ADAPTER_KIND_POLICY: AdapterKind.POLICY,
    types_pb2.ADAPTER_KIND_REWARD: AdapterKind.REWARD,
    types_pb2.ADAPTER_KIND_REFERENCE: AdapterKind.REFERENCE,
    types_pb2.ADAPTER_KIND_CRITIC: AdapterKind.CRITIC,
}
_KIND_MESSAGES = {kind: value for value, kind in _KINDS.items()}
_POOLINGS = {
    types_pb2.POOLING_LAST_TOKEN: Pooling.LAST_TOKEN,
    types_pb2.POOLING_LAST_NOT_PAD: Pooling.LAST_NOT_PAD,
}
_POOLING_MESSAGES = {rule: value for value, rule in _POOLINGS.items()}

_KIND_NAMES = "policy, reward, reference or critic"

_Load = adapters_pb2.LoadAdapterRequest | adapters_pb2.UploadAdapterHeader

_MODULE = re.compile(r"[A-Za-z0-9_.-]{1,256}", re.ASCII)


def read_create(request: adapters_pb2.CreateAdapterRequest, limits: Limits) -> NewAdapter:
    """Checks a request of CreateAdapter.

    Raises:
        InvalidArgument: naming the field.
        ResourceExhausted: LIMIT_EXCEEDED for a rank over the server's limit.
    """
    check_new_name(request.name, "name")
    kind = read_kind(request.kind) or AdapterKind.POLICY
    if not kind.trained:
        raise out_of_range(
            "kind", kind.value, "policy or critic; what is frozen is not made here, but loaded with LoadAdapter"
        )
    if request.init_from == BASE_NAME:
        raise InvalidArgument(
            "OUT_OF_RANGE", "init_from is 'base': leave it out, and the adapter begins as the base", field="init_from"
        )
    if request.init_from and request.HasField("lora"):
        raise InvalidArgument(
            "UNUSED_FIELD",
            f"lora is set, and the shape is that of init_from, {request.init_from!r}: leave one of the two out",
            field="lora",
        )
    return NewAdapter(
        name=request.name,
        lora=_read_lora(request.lora, limits) if request.HasField("lora") else LoraSpec(),
        value_head=request.value_head or kind is AdapterKind.CRITIC,
        seed=request.seed,
        kind=kind,
        init_from=request.init_from,
    )


def read_loaded(request: _Load, source: str = "") -> LoadedAdapter:
    """Checks a request to load an adapter, or the header of an upload; the path is still open.

    Raises:
        InvalidArgument: naming the field.
    """
    check_new_name(request.name, "name")
    kind = read_kind(request.kind)
    if kind is None:
        raise required("kind", f"give {_KIND_NAMES}")
    if request.value_head and not kind.trained:
        raise InvalidArgument(
            "UNUSED_FIELD", f"value_head is set, and a {kind.value} adapter has none: leave it out", field="value_head"
        )
    return LoadedAdapter(
        name=request.name,
        kind=kind,
        path=Path(),
        value_head=request.value_head,
        replace=request.replace,
        with_optimizer=request.with_optimizer,
        seed=request.seed,
        source=source,
        append_eos=_read_append_eos(request, kind),
        pooling=_read_declared_pooling(request, kind),
    )


def _read_append_eos(request: _Load, kind: AdapterKind) -> bool | None:
    if not request.HasField("append_eos"):
        return None
    _check_reward(kind, "append_eos")
    return request.append_eos


def _read_declared_pooling(request: _Load, kind: AdapterKind) -> Pooling | None:
    pooling = read_pooling(request.pooling)
    if pooling is not None:
        _check_reward(kind, "pooling")
    return pooling


def _check_reward(kind: AdapterKind, field: str) -> None:
    if kind is not AdapterKind.REWARD:
        raise InvalidArgument(
            "UNUSED_FIELD", f"{field} is set, and a {kind.value} adapter has no scores: leave it out", field=field
        )


def read_save(request: adapters_pb2.SaveAdapterRequest) -> SavedAdapter:
    """Checks a request of SaveAdapter; the path is still open.

    Raises:
        InvalidArgument: naming the field.
    """
    check_name(request.name, "name")
    if request.merged and request.with_optimizer:
        raise InvalidArgument(
            "UNUSED_FIELD",
            "with_optimizer is set, and a merged model has no place for the moments: leave it out",
            field="with_optimizer",
        )
    return SavedAdapter(request.name, Path(), request.with_optimizer, request.overwrite, request.merged)


def read_kind(kind: int) -> AdapterKind | None:
    """The kind, or None where it is not set.

    Raises:
        InvalidArgument: OUT_OF_RANGE for a number that is no kind.
    """
    if kind == types_pb2.ADAPTER_KIND_UNSPECIFIED:
        return None
    if kind not in _KINDS:
        raise out_of_range("kind", kind, _KIND_NAMES)
    return _KINDS[types_pb2.AdapterKind.ValueType(kind)]


def read_pooling(pooling: int) -> Pooling | None:
    """Where scores are read, or None where it is not set.

    Raises:
        InvalidArgument: OUT_OF_RANGE for a number that is no pooling rule.
    """
    if pooling == types_pb2.POOLING_UNSPECIFIED:
        return None
    if pooling not in _POOLINGS:
        raise out_of_range("pooling", pooling, " or ".join(rule.value for rule in Pooling))
    return _POOLINGS[types_pb2.Pooling.ValueType(pooling)]


def adapter_message(
    entry: Entry, *, leased: bool, durable: int | None = None, all_names: bool = False
) -> types_pb2.Adapter:
    """An adapter as clients see it; with `all_names`, among those of all tenants: "tenant/name".

    `durable` is its newest version that would be there after a crash, if any.
    """
    facts = entry.facts
    return types_pb2.Adapter(
        name=entry.key if all_names else entry.name,
        kind=_KIND_MESSAGES[facts.kind],
        version=facts.version,
        lora=types_pb2.LoraSpec(
            rank=facts.lora.rank,
            alpha=facts.lora.alpha,
            target_modules=facts.lora.target_modules,
            use_rslora=facts.lora.use_rslora,
            rank_pattern=facts.lora.rank_pattern,
            alpha_pattern=facts.lora.alpha_pattern,
        ),
        value_head=facts.value_head,
        num_labels=facts.num_labels,
        parameter_count=facts.parameter_count,
        memory=types_pb2.AdapterMemory(
            weights_bytes=facts.memory.weights,
            gradient_bytes=facts.memory.gradients,
            optimizer_bytes=facts.memory.optimizer,
            old_version_bytes=facts.memory.old_versions,
        ),
        leased=leased,
        pending_gradients=facts.pending_gradients,
        create_time=entry.create_time,
        source=entry.source if caller().tenant in (entry.owner, OPERATOR) else "",  # a path of the server's
        append_eos=facts.append_eos,
        pooling=_pooling_message(facts),
        resident=facts.resident,
        durable_version=durable,
    )


def _pooling_message(facts: AdapterFacts) -> types_pb2.Pooling.ValueType:
    reward = facts.kind is AdapterKind.REWARD
    return _POOLING_MESSAGES[facts.pooling] if reward else types_pb2.POOLING_UNSPECIFIED


def save_response(name: str, result: SaveResult) -> adapters_pb2.SaveAdapterResponse:
    """Where the adapter of that name was written."""
    return adapters_pb2.SaveAdapterResponse(
        path=str(result.path),
        adapter=types_pb2.AdapterVersion(name=name, version=result.version),
        bytes=result.bytes,
    )


def checkpoint_response(name: str, version: int) -> adapters_pb2.CheckpointAdapterResponse:
    """The version of the adapter of that name that is durable."""
    return adapters_pb2.CheckpointAdapterResponse(adapter=types_pb2.AdapterVersion(name=name, version=version))


def client_state_response(name: str, state: ClientState) -> adapters_pb2.GetClientStateResponse:
    """What is kept with the adapter of that name."""
    version = types_pb2.AdapterVersion(name=name, version=state.version)
    return adapters_pb2.GetClientStateResponse(adapter=version, client_state=state.data)


def _read_lora(lora: types_pb2.LoraSpec, limits: Limits) -> LoraSpec:
    _check_modules(lora)
    for field, keys in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        if len(keys) > patterns.MAX_NAMES:
            raise out_of_range(f"lora.{field}", f"a map of {len(keys)}", f"at most {patterns.MAX_NAMES}")
    budget = patterns.checking()
    for pattern in (*lora.rank_pattern, *lora.alpha_pattern):
        _check_pattern(pattern, "lora.rank_pattern" if pattern in lora.rank_pattern else "lora.alpha_pattern", budget)
    ranks = {
        pattern: _rank(rank, f"lora.rank_pattern[{pattern}]", limits) for pattern, rank in lora.rank_pattern.items()
    }
    alphas = {
        pattern: number(alpha, f"lora.alpha_pattern[{pattern}]", above=0)
        for pattern, alpha in lora.alpha_pattern.items()
    }
    return LoraSpec(
        rank=_rank(lora.rank, "lora.rank", limits),
        alpha=number(lora.alpha, "lora.alpha", above=0),
        target_modules=tuple(lora.target_modules),
        use_rslora=lora.use_rslora,
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )


def _rank(rank: int, field: str, limits: Limits) -> int:
    integer(rank, field, least=1)
    if rank > limits.max_rank:
        raise ResourceExhausted(
            "LIMIT_EXCEEDED", f"{field} is {rank}, and this server's largest rank is {limits.max_rank}", field=field
        )
    return rank


def _check_modules(lora: types_pb2.LoraSpec) -> None:
    if not lora.target_modules:
        raise required("lora.target_modules", 'name linear layers such as "q_proj", or "all-linear"')
    if len(lora.target_modules) > patterns.MAX_NAMES:
        raise out_of_range(
            "lora.target_modules", f"a list of {len(lora.target_modules)}", f"at most {patterns.MAX_NAMES}"
        )
    for index, module in enumerate(lora.target_modules):
        if not _MODULE.fullmatch(module):
            field = f"lora.target_modules[{index}]"
            raise InvalidArgument(
                "BAD_MODULE_NAME",
                f"{field} is {module[:256]!r}: use a module's name or path, or all-linear",
                field=field,
            )


def _check_pattern(pattern: str, field: str, budget: patterns.Budget) -> None:
    try:
        patterns.check(pattern, budget)
    except patterns.PatternError as error:
        raise InvalidArgument("BAD_PATTERN", f"{field} has the key {pattern[:256]!r}: {error}", field=field) from None
