"""The client of a onebase server: typed, light, with numpy arrays in and out.

    import onebase.client as onebase

    with onebase.connect("127.0.0.1:7070") as client:
        for reward in client.reward([onebase.Sequence("The film was", " wonderful.")]):
            print(reward.score)

        with client.open_session("policy_1") as session:
            completions = session.generate("The film was", sampling=onebase.SamplingParams(max_new_tokens=20))
            scores = session.score([onebase.Sequence("The film was", c.tokens) for c in completions])

A `Client` asks what anybody may ask. A `Session` holds the lease of its policies: it trains them and makes one of them
the active adapter, which is meant where a call names none. A `Policy` is a session's handle on one of them.

Training is three calls: what the policy wrote is scored, gradients are added, and a step is made with them:

    trained = [onebase.TrainingSequence("The film was", c.tokens, old_logprobs, old_values, advantages, returns)]
    session.forward_backward(trained, onebase.PpoLoss())
    session.optim_step(onebase.AdamW(learning_rate=1e-4), max_grad_norm=1.0)

With asyncio the same methods are awaited (`onebase.client.aio` says more):

    async with onebase.connect_async("127.0.0.1:7070") as client, client.open_session("policy_1") as session:
        completions = await session.generate("The film was")
        async for chunk in session.stream("The film was"):
            print(chunk.text)

Sequences are `Sequence(prompt, completion)`, each part a text or token ids; per-token arrays are float32 of shape [t],
one number per token of the completion. Whatever a server refuses is raised as an `OnebaseError`, which names the field
that is to blame; `onebase.client.errors` draws the tree. What may be repeated safely is repeated by the client.
"""

from onebase.client.aio import AsyncClient, AsyncPolicy, AsyncSession, AsyncStream
from onebase.client.aio import connect as connect_async
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
    Chat,
    ChatMessage,
    ClientState,
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
    Pooling,
    PpoLoss,
    QueueStatus,
    Reward,
    RewardTerm,
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
from onebase.client.waits import Wait

__all__ = [
    "BASE",
    "AbortedError",
    "AdamW",
    "Adapter",
    "AdapterKind",
    "AdapterVersion",
    "AlreadyExistsError",
    "AsyncClient",
    "AsyncPolicy",
    "AsyncSession",
    "AsyncStream",
    "BaseModel",
    "CancelledError",
    "Chat",
    "ChatMessage",
    "Client",
    "ClientState",
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
    "Pooling",
    "PpoLoss",
    "QueueStatus",
    "ResourceExhaustedError",
    "Reward",
    "RewardTerm",
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
    "Wait",
    "connect",
    "connect_async",
]
