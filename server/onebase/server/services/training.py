"""TrainingService: gradients accumulate, then one optimizer step makes the next version."""

# Names, arguments and descriptions of the methods are the contract's.
# ruff: noqa: D102, N802

from __future__ import annotations

from functools import partial
from typing import Any

import grpc

from onebase.server.calls import settle, settled
from onebase.server.codec.fields import required
from onebase.server.codec.training import (
    forward_backward_response,
    optim_step_response,
    read_forward_backward,
    read_optim_step,
)
from onebase.server.edge import Edge
from onebase.server.idempotency import record
from onebase.server.jobs import OptimStepJob
from onebase.server.leases import Session
from onebase.server.registry import Entry
from onebase.v1 import training_pb2, training_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class TrainingService(training_pb2_grpc.TrainingServiceServicer):
    """Trains the policies and critics that a session holds the lease of."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge

    async def ForwardBackward(
        self, request: training_pb2.ForwardBackwardRequest, context: Context
    ) -> training_pb2.ForwardBackwardResponse:
        edge = self._edge

        async def work(session: Session | None, deadline: float | None) -> training_pb2.ForwardBackwardResponse:
            entry = edge.access.trainable(_needed(session), request.adapter, "adapter")
            with edge.place(session) as place, edge.fences.training(entry):
                job = await read_forward_backward(request, entry, edge.reader)
                edge.access.require(session, entry)
                result = await settle(place, job, session, deadline)
                edge.registry.update(result.facts)
                response = forward_backward_response(entry.name, result)
                # The pass is made, under a version that may not be shown yet: a repeated call must not make it again.
                show = partial(edge.keeper.seen, {entry.uid: result.version})
                edge.idempotency.applied("ForwardBackward", request, response, show)
                await settled(show())
                return response

        return await edge.once("ForwardBackward", request, context, work)

    async def OptimStep(
        self, request: training_pb2.OptimStepRequest, context: Context
    ) -> training_pb2.OptimStepResponse:
        edge = self._edge

        async def work(session: Session | None, deadline: float | None) -> training_pb2.OptimStepResponse:
            entry = edge.access.trainable(_needed(session), request.adapter, "adapter")
            job = read_optim_step(request, entry)
            edge.access.require(session, entry)
            with edge.fences.training(entry):
                return await step(entry, job, session, deadline)

        async def step(
            entry: Entry, job: OptimStepJob, session: Session | None, deadline: float | None
        ) -> training_pb2.OptimStepResponse:
            await edge.keeper.before_step(entry)
            job.save_to = edge.keeper.step_path(entry)
            with edge.keeper.stepping(entry):
                result = await settle(edge.worker, job, session, deadline)
                edge.registry.update(result.facts)
                response = optim_step_response(entry.name, result)
                # From here on the step is made: if it cannot be made durable now, a repeated call does no more.
                finish = partial(edge.keeper.finish_step, entry.uid, result.version)
                edge.idempotency.applied("OptimStep", request, response, finish)
                await edge.keeper.stepped(entry, result, record("OptimStep", request, response))
            return response

        return await edge.once("OptimStep", request, context, work)


def _needed(session: Session | None) -> Session:
    if session is None:
        raise required("session_id", "open a session, whose lease on the adapter training needs")
    return session
