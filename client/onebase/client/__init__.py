"""The client of a onebase server: typed, light, with numpy arrays in and out.

    import onebase.client as onebase

    with onebase.connect("127.0.0.1:7070") as client:
        for reward in client.reward([onebase.Sequence("The film was", " wonderful.")]):
            print(reward.score)

        with client.open_session("policy_1") as session:
            completions = session.generate("The film was", sampling=onebase.SamplingParams(max_new_tokens=20))
            scores = session.score([onebase.Sequence("The film was", c.tokens) for c in completions])

Whatever a server refuses is raised as an `OnebaseError`; `onebase.client.errors` draws the tree.
"""

from onebase.client.client import Client, connect
from onebase.client.errors import (
    AbortedError,
    AlreadyExistsError,
    CancelledError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    OnebaseError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from onebase.client.policy import Policy
from onebase.client.session import Session
from onebase.client.transport import Stream
from onebase.client.types import (
    BASE,
    AdamW,
    Adapter,
    AdapterKind,
    AdapterVersion,
    BaseModel,
    Completion,
    CompletionChunk,
    Content,
    CrossEntropyLoss,
    CustomLoss,
    DpoLoss,
    FinishReason,
    ForwardBackward,
    ImportanceSamplingLoss,
    Logprobs,
    LoraSpec,
    Loss,
    OptimStep,
    PpoLoss,
    QueueStatus,
    Reward,
    SamplingParams,
    SavedAdapter,
    Score,
    ScoreOutput,
    Sequence,
    ServerInfo,
    ServerLimits,
    ServerStatus,
    SessionInfo,
    SessionStatus,
    Tokens,
    TrainingSequence,
    ValueLoss,
)

__all__ = [
    "BASE",
    "AbortedError",
    "AdamW",
    "Adapter",
    "AdapterKind",
    "AdapterVersion",
    "AlreadyExistsError",
    "BaseModel",
    "CancelledError",
    "Client",
    "Completion",
    "CompletionChunk",
    "Content",
    "CrossEntropyLoss",
    "CustomLoss",
    "DataLossError",
    "DeadlineExceededError",
    "DpoLoss",
    "FailedPreconditionError",
    "FinishReason",
    "ForwardBackward",
    "ImportanceSamplingLoss",
    "InternalError",
    "InvalidArgumentError",
    "Logprobs",
    "LoraSpec",
    "Loss",
    "NotFoundError",
    "OnebaseError",
    "OptimStep",
    "PermissionDeniedError",
    "Policy",
    "PpoLoss",
    "QueueStatus",
    "ResourceExhaustedError",
    "Reward",
    "SamplingParams",
    "SavedAdapter",
    "Score",
    "ScoreOutput",
    "Sequence",
    "ServerInfo",
    "ServerLimits",
    "ServerStatus",
    "Session",
    "SessionInfo",
    "SessionStatus",
    "Stream",
    "Tokens",
    "TrainingSequence",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "ValueLoss",
    "connect",
]
