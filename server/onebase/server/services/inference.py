"""InferenceService: generate, logprobs, rewards, and PPO's numbers in one call."""

# Names, arguments and descriptions of the methods are the contract's.
# ruff: noqa: D102, N802

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from onebase.server.calls import deadline_of, looks_again, perform, stream_looks_again
from onebase.server.codec import score
from onebase.server.codec.fields import version
from onebase.server.codec.generation import read_generation
from onebase.server.codec.rewards import read_reward, read_terms
from onebase.server.codec.scoring import read_logprob, read_reference_logprob
from onebase.server.edge import Edge
from onebase.server.streams import stream
from onebase.v1 import inference_pb2, inference_pb2_grpc

_REWARDS = "rewards[{}].adapter"

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Reads; changes no adapter."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge

    @stream_looks_again
    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        edge = self._edge
        with edge.sessions.use(request.session_id) as session:
            adapter = edge.access.readable(session, request.adapter, version(request, "adapter_version"))
            with edge.place(session) as place:
                generation = await read_generation(request, adapter, edge.reader, edge.worker.facts)
                chunks = stream(place, generation.job, session, deadline_of(context))
                async with contextlib.aclosing(chunks):
                    async for chunk in chunks:
                        await edge.keeper.seen({adapter.uid: chunk.version})
                        yield generation.response(chunk)

    @looks_again
    async def Logprob(self, request: inference_pb2.LogprobRequest, context: Context) -> inference_pb2.LogprobResponse:
        edge = self._edge
        with edge.sessions.use(request.session_id) as session:
            adapter = edge.access.readable(session, request.adapter, version(request, "adapter_version"))
            with edge.place(session) as place:
                plan = await read_logprob(request, adapter, edge.reader)
                result = await perform(place, plan.job, session, deadline_of(context))
                await edge.keeper.seen(result.versions)
                return plan.response(result)

    @looks_again
    async def ReferenceLogprob(
        self, request: inference_pb2.ReferenceLogprobRequest, context: Context
    ) -> inference_pb2.LogprobResponse:
        edge = self._edge
        with edge.sessions.use(request.session_id) as session:
            reference = edge.access.reference(request.reference)
            with edge.place(session) as place:
                plan = await read_reference_logprob(request, reference, edge.reader)
                return plan.response(await perform(place, plan.job, session, deadline_of(context)))

    @looks_again
    async def Reward(self, request: inference_pb2.RewardRequest, context: Context) -> inference_pb2.RewardResponse:
        edge = self._edge
        with edge.sessions.use(request.session_id) as session:
            if request.ppo_adapter_name:
                edge.access.activate(session, request.ppo_adapter_name)
            terms = read_terms(request, edge.access.rewards([term.adapter for term in request.rewards], _REWARDS))
            with edge.place(session) as place:
                plan = await read_reward(request, terms, edge.reader)
                result = await perform(place, plan.job, session, deadline_of(context))
                await edge.keeper.synced(request.session_id)
                return plan.response(result, session.active if session else "")

    @looks_again
    async def Score(self, request: inference_pb2.ScoreRequest, context: Context) -> inference_pb2.ScoreResponse:
        edge = self._edge
        with edge.sessions.use(request.session_id) as session:
            policy = edge.access.policy(session, request.ppo_adapter_name, "ppo_adapter_name")
            if session is not None:
                edge.access.activate(session, policy.name)
            outputs = score.read_outputs(request)
            rewards = [term.adapter for term in request.rewards]
            adapters = score.Adapters(
                policy=policy,
                reference=edge.access.reference(request.reference),
                critic=edge.access.critic(request.critic) if request.critic else None,
                rewards=read_terms(request, edge.access.rewards(rewards, _REWARDS)) if outputs.rewards else [],
            )
            with edge.place(session) as place:
                plan = await score.read_score(request, adapters, outputs, edge.reader)
                result = await perform(place, plan.job, session, deadline_of(context))
                await edge.keeper.seen(result.versions)
                await edge.keeper.synced(request.session_id)
                return plan.response(result, session.active if session else "")
