"""Which scope each method needs, and which methods change something: one table, total over what the server serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from onebase.server.identity import Scope


@dataclass(frozen=True)
class Rule:
    """What a call of a method needs."""

    scope: Scope | None = None
    """None: any token will do."""
    changes: bool = False
    """Whether it changes something, and so is written to the audit log also where it was fine."""
    public: bool = False
    """Whether it needs no token at all."""


_ANY, _PUBLIC = Rule(), Rule(public=True)
_READ_STATUS, _GENERATE, _REWARD = Rule(Scope.STATUS), Rule(Scope.GENERATE), Rule(Scope.REWARD)
_TRAIN, _ADAPTERS = Rule(Scope.TRAIN, changes=True), Rule(Scope.ADAPTERS, changes=True)
_SESSION = Rule(changes=True)

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "/onebase.v1.AdapterService/CreateAdapter": _ADAPTERS,
        "/onebase.v1.AdapterService/GetAdapter": _ANY,
        "/onebase.v1.AdapterService/ListAdapters": _ANY,
        "/onebase.v1.AdapterService/DeleteAdapter": _ADAPTERS,
        "/onebase.v1.AdapterService/LoadAdapter": _ADAPTERS,
        "/onebase.v1.AdapterService/SaveAdapter": _ADAPTERS,
        "/onebase.v1.AdapterService/UploadAdapter": _ADAPTERS,
        "/onebase.v1.AdapterService/DownloadAdapter": _ADAPTERS,
        "/onebase.v1.AdapterService/CheckpointAdapter": _TRAIN,
        "/onebase.v1.AdapterService/GetClientState": Rule(Scope.TRAIN),
        "/onebase.v1.InferenceService/Generate": _GENERATE,
        "/onebase.v1.InferenceService/Logprob": _REWARD,
        "/onebase.v1.InferenceService/ReferenceLogprob": _REWARD,
        "/onebase.v1.InferenceService/Reward": _REWARD,
        "/onebase.v1.InferenceService/Score": _REWARD,
        "/onebase.v1.ServerService/GetServerInfo": _ANY,
        "/onebase.v1.ServerService/GetStatus": _READ_STATUS,
        # A session's lease needs the scope train besides: `access` sees to that.
        "/onebase.v1.SessionService/OpenSession": _SESSION,
        "/onebase.v1.SessionService/GetSession": _ANY,
        "/onebase.v1.SessionService/SetActiveAdapter": _SESSION,
        "/onebase.v1.SessionService/KeepAlive": _ANY,
        "/onebase.v1.SessionService/AttendSession": _ANY,
        "/onebase.v1.SessionService/CloseSession": _SESSION,
        "/onebase.v1.TrainingService/ForwardBackward": _TRAIN,
        "/onebase.v1.TrainingService/OptimStep": _TRAIN,
        # Load balancers ask for health, and have no token; it says serving or not, of services that all servers have.
        "/grpc.health.v1.Health/Check": _PUBLIC,
        "/grpc.health.v1.Health/Watch": _PUBLIC,
        "/grpc.health.v1.Health/List": _PUBLIC,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _ANY,
    }
)
"""A method that is not here is nobody's: it is refused."""

ANY_TOKEN = "/onebase.v1.ServerService/GetServerInfo"
"""A method that any token opens: who asks for one that is not there needs no more, and no less."""
