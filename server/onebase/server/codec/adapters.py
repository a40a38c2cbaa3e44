"""Adapters: requests to make, load and save them, and an adapter as a message."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from onebase.server.catalog import LoadedAdapter, NewAdapter, SavedAdapter
from onebase.server.codec.fields import integer, number, out_of_range, required
from onebase.server.config import Limits
from onebase.server.errors import InvalidArgument, ResourceExhausted
from onebase.server.jobs import AdapterKind, LoraSpec, SaveResult
from onebase.server.names import check_name, check_new_name
from onebase.server.paths import Roots
from onebase.server.registry import Entry
from onebase.v1 import adapters_pb2, types_pb2

_KINDS = {
    types_pb2.ADAPTER_KIND_POLICY: AdapterKind.POLICY,
    types_pb2.ADAPTER_KIND_REWARD: AdapterKind.REWARD,
    types_pb2.ADAPTER_KIND_REFERENCE: AdapterKind.REFERENCE,
}
_KIND_MESSAGES = {kind: value for value, kind in _KINDS.items()}

_MAX_MODULES = 4096
_MODULE = re.compile(r"[A-Za-z0-9_.-]{1,256}", re.ASCII)
# A pattern is a regular expression to PEFT. Without repetition it can take no time to speak of to match.
_PATTERN = re.compile(r"[A-Za-z0-9_.^$|()\[\]\\-]{1,256}", re.ASCII)


def read_create(request: adapters_pb2.CreateAdapterRequest, limits: Limits) -> NewAdapter:
    """Checks a request of CreateAdapter.

    Raises:
        InvalidArgument: naming the field.
        ResourceExhausted: LIMIT_EXCEEDED for a rank over the server's limit.
    """
    check_new_name(request.name, "name")
    lora = _read_lora(request.lora, limits) if request.HasField("lora") else LoraSpec()
    return NewAdapter(request.name, lora, request.value_head, request.seed)


def read_load(request: adapters_pb2.LoadAdapterRequest, roots: Roots) -> LoadedAdapter:
    """Checks a request of LoadAdapter.

    Raises:
        InvalidArgument: naming the field.
        FailedPrecondition, PermissionDenied: the path may not be read.
    """
    return replace(read_loaded(request), path=roots.readable(request.path))


def read_loaded(
    request: adapters_pb2.LoadAdapterRequest | adapters_pb2.UploadAdapterHeader, source: str = ""
) -> LoadedAdapter:
    """Checks what these two have in common; the path is still open.

    Raises:
        InvalidArgument: naming the field.
    """
    check_new_name(request.name, "name")
    kind = read_kind(request.kind)
    if kind is None:
        raise required("kind", "give policy, reward or reference")
    if request.value_head and kind is not AdapterKind.POLICY:
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
    )


def read_save(request: adapters_pb2.SaveAdapterRequest, roots: Roots) -> SavedAdapter:
    """Checks a request of SaveAdapter.

    Raises:
        InvalidArgument: naming the field.
        FailedPrecondition, PermissionDenied: the path may not be written.
    """
    check_name(request.name, "name")
    if request.merged and request.with_optimizer:
        raise InvalidArgument(
            "UNUSED_FIELD",
            "with_optimizer is set, and a merged model has no place for the moments: leave it out",
            field="with_optimizer",
        )
    path = roots.writable(request.path)
    return SavedAdapter(request.name, path, request.with_optimizer, request.overwrite, request.merged)


def read_kind(kind: int) -> AdapterKind | None:
    """The kind, or None where it is not set.

    Raises:
        InvalidArgument: OUT_OF_RANGE for a number that is no kind.
    """
    if kind == types_pb2.ADAPTER_KIND_UNSPECIFIED:
        return None
    if kind not in _KINDS:
        raise out_of_range("kind", kind, "policy, reward or reference")
    return _KINDS[types_pb2.AdapterKind.ValueType(kind)]


def adapter_message(entry: Entry, *, leased: bool) -> types_pb2.Adapter:
    """An adapter as clients see it."""
    facts = entry.facts
    return types_pb2.Adapter(
        name=entry.name,
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
        source=entry.source,
    )


def save_response(name: str, result: SaveResult) -> adapters_pb2.SaveAdapterResponse:
    """Where the adapter of that name was written."""
    return adapters_pb2.SaveAdapterResponse(
        path=str(result.path),
        adapter=types_pb2.AdapterVersion(name=name, version=result.version),
        bytes=result.bytes,
    )


def _read_lora(lora: types_pb2.LoraSpec, limits: Limits) -> LoraSpec:
    _check_modules(lora)
    for pattern in (*lora.rank_pattern, *lora.alpha_pattern):
        _check_pattern(pattern, "lora.rank_pattern" if pattern in lora.rank_pattern else "lora.alpha_pattern")
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
    if len(lora.target_modules) > _MAX_MODULES:
        raise out_of_range("lora.target_modules", f"a list of {len(lora.target_modules)}", f"at most {_MAX_MODULES}")
    for index, module in enumerate(lora.target_modules):
        if not _MODULE.fullmatch(module):
            field = f"lora.target_modules[{index}]"
            raise InvalidArgument(
                "BAD_MODULE_NAME",
                f"{field} is {module[:256]!r}: use a module's name or path, or all-linear",
                field=field,
            )


def _check_pattern(pattern: str, field: str) -> None:
    try:
        fine = _PATTERN.fullmatch(pattern) is not None
        re.compile(pattern)
    except re.error:
        fine = False
    if not fine:
        raise InvalidArgument(
            "BAD_MODULE_NAME",
            f"{field} has the key {pattern[:256]!r}: use a module's name or path, or a regular expression of them "
            "without repetition",
            field=field,
        )
