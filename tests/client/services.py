"""The fake server's services: every method of the contract, answering by counting."""

from __future__ import annotations

import functools
import threading

import grpc
from client.wire import Failure, floats, ids, length, version

from onebase.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
    sessions_pb2,
    sessions_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
    types_pb2,
)


class Servicer:
    def __init__(self, fake):
        self.fake = fake


class Server(Servicer, server_pb2_grpc.ServerServiceServicer):
    def GetServerInfo(self, request, context):
        info = server_pb2.ServerInfo(
            version="9.9",
            base=server_pb2.BaseModel(
                model="fake/base", vocab_size=256, pad_token_id=-1, bos_token_id=1, dtype="float32", chat_template=True
            ),
            limits=server_pb2.ServerLimits(max_rank=64),
            reward_adapters=["helpful"],
        )
        return self.fake.answer("GetServerInfo", request, context, lambda: info)

    def GetStatus(self, request, context):
        status = server_pb2.ServerStatus(
            uptime_seconds=3723.0,
            sessions=[server_pb2.SessionStatus(label=s.label, ppo_adapter_name=s.ppo_adapter_name, leases=s.leases)
                      for s in self.fake.sessions.values()],
            adapters=list(self.fake.adapters.values()),
            queues=[server_pb2.QueueStatus(work="train", waiting=4, running=1)],
            generated_tokens_per_second=1234.5,
            rss_bytes=3 * 1024**3,
            base_bytes=2 * 1024**2,
        )  # fmt: skip
        return self.fake.answer("GetStatus", request, context, lambda: status)


class Sessions(Servicer, sessions_pb2_grpc.SessionServiceServicer):
    def OpenSession(self, request, context):
        def work():
            session = sessions_pb2.Session(
                session_id=request.resume_session_id or f"{len(self.fake.sessions):032x}",
                ppo_adapter_name=request.ppo_adapter_name,
                label=request.label,
                leases=[request.ppo_adapter_name] if request.ppo_adapter_name else [],
                ttl_seconds=request.ttl_seconds if request.HasField("ttl_seconds") else 60,
            )
            return self.fake.sessions.setdefault(session.session_id, session)

        once = functools.partial(self.fake.once, request, work)
        return self.fake.answer("OpenSession", request, context, once)

    def _find(self, request, context):
        if request.session_id not in self.fake.sessions:
            context.abort_with_status(Failure(grpc.StatusCode.NOT_FOUND, reason="SESSION_NOT_FOUND").status())
        return self.fake.sessions[request.session_id]

    def GetSession(self, request, context):
        return self.fake.answer("GetSession", request, context, lambda: self._find(request, context))

    def KeepAlive(self, request, context):
        return self.fake.answer("KeepAlive", request, context, lambda: self._find(request, context))

    def AttendSession(self, request, context):
        if not self.fake.attends:
            yield from super().AttendSession(request, context)  # UNIMPLEMENTED
        yield self.fake.answer("AttendSession", request, context, lambda: self._find(request, context))
        gone = threading.Event()
        context.add_callback(gone.set)
        while request.session_id in self.fake.sessions and not gone.wait(0.01):
            if self.fake.cuts:
                self.fake.cuts -= 1
                context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    def SetActiveAdapter(self, request, context):
        def work():
            session = self._find(request, context)
            session.ppo_adapter_name = request.ppo_adapter_name
            return session

        return self.fake.answer("SetActiveAdapter", request, context, work)

    def CloseSession(self, request, context):
        def work():
            self._find(request, context)
            del self.fake.sessions[request.session_id]
            return sessions_pb2.CloseSessionResponse()

        return self.fake.answer("CloseSession", request, context, work)


class Inference(Servicer, inference_pb2_grpc.InferenceServiceServicer):
    def Generate(self, request, context):
        self.fake.answer("Generate", request, context, lambda: None)
        context.add_callback(self.fake.cancelled.set)
        adapter = request.adapter or self.fake.active(request)
        # The last completion comes first, so that a client that trusts the order of arrival goes wrong.
        for p, prompt in reversed(list(enumerate(request.prompts))):
            for c in reversed(range(request.sampling.n)):
                for message in _pieces(request, p, c, prompt, adapter):
                    yield message
                    if self.fake.cuts:
                        self.fake.cuts -= 1
                        context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
                    if self.fake.hold is not None:
                        self.fake.hold.wait(60)
                    if not context.is_active():
                        return

    def Logprob(self, request, context):
        def work():
            adapter = request.adapter or self.fake.active(request)
            return inference_pb2.LogprobResponse(
                results=[_logprobs(s, request) for s in request.sequences], adapter=version(adapter)
            )

        return self.fake.answer("Logprob", request, context, work)

    def ReferenceLogprob(self, request, context):
        def work():
            results = [
                inference_pb2.LogprobResult(logprobs=floats(*[-3.0] * length(s.completion))) for s in request.sequences
            ]
            return inference_pb2.LogprobResponse(results=results, adapter=version(request.reference, 0))

        return self.fake.answer("ReferenceLogprob", request, context, work)

    def Reward(self, request, context):
        def work():
            terms = list(request.rewards) or [inference_pb2.RewardTerm(adapter="helpful")]
            results = []
            for sequence in request.sequences:
                scores = [length(sequence.completion) + 100.0 * i for i in range(len(terms))]
                tokens = length(sequence.prompt) + length(sequence.completion)
                per_token = [floats(*[score + t for t in range(tokens)]) for score in scores]
                results.append(
                    inference_pb2.RewardResult(
                        scores=scores,
                        token_scores=per_token if request.per_token else None,
                        tokens=[tokens] * len(terms),
                        eos_appended=[request.append_eos] * len(terms),
                        reward=_weighted(terms, scores),
                    )
                )
            return inference_pb2.RewardResponse(
                results=results,
                rewards=[version(term.adapter) for term in terms],
                ppo_adapter_name=self.fake.active(request, request.ppo_adapter_name),
            )

        return self.fake.answer("Reward", request, context, work)

    def Score(self, request, context):
        def work():
            terms = list(request.rewards) or [inference_pb2.RewardTerm(adapter="helpful")]
            results = []
            for sequence in request.sequences:
                size = length(sequence.completion)
                scores = [size + 100.0 * i for i in range(len(terms))]
                results.append(
                    inference_pb2.ScoreResult(
                        logprobs=floats(*[-1.0] * size),
                        reference_logprobs=floats(*[-3.0] * size),
                        values=floats(*[0.5] * size),
                        scores=scores,
                        reward=_weighted(terms, scores),
                        eos_appended=[request.append_eos] * len(terms),
                    )
                )
            return inference_pb2.ScoreResponse(
                results=results,
                policy=version(self.fake.active(request, request.ppo_adapter_name)),
                reference=version(request.reference, 0),
                rewards=[version(term.adapter, 3) for term in terms],
                ppo_adapter_name=self.fake.active(request),
            )

        return self.fake.answer("Score", request, context, work)


def _weighted(terms, scores):
    weights = [term.weight if term.HasField("weight") else 1.0 for term in terms]
    return sum(w * s for w, s in zip(weights, scores, strict=True))


def _pieces(request, p, c, prompt, adapter):
    count = request.sampling.max_new_tokens
    text = prompt.text or "ab"
    numbers = [1000 * p + 100 * c + i for i in range(count)]
    steps = [[i] for i in range(count)] if request.stream_tokens else [list(range(count))]
    for step in steps:
        message = inference_pb2.GenerateResponse(
            prompt_index=p,
            completion_index=c,
            text="".join(text[i % len(text)] for i in step),
            tokens=ids(*[numbers[i] for i in step]),
            adapter=version(adapter),
            seed=request.sampling.seed,
            prompt_tokens=length(prompt),
        )
        if request.return_logprobs:
            message.logprobs.CopyFrom(floats(*[-float(i) for i in step]))
        if step[-1] == count - 1:
            message.finish_reason = inference_pb2.FINISH_REASON_LENGTH
        yield message


def _logprobs(sequence, request):
    size = length(sequence.completion)
    result = inference_pb2.LogprobResult(logprobs=floats(*[-1.0] * size))
    if request.return_entropy:
        result.entropy.CopyFrom(floats(*[2.0] * size))
    if sequence.completion.HasField("text"):
        result.completion_tokens.CopyFrom(ids(*[ord(character) for character in sequence.completion.text]))
    return result


class Training(Servicer, training_pb2_grpc.TrainingServiceServicer):
    def ForwardBackward(self, request, context):
        def work():
            self.fake.gradients += 1
            return training_pb2.ForwardBackwardResponse(
                adapter=version(request.adapter or self.fake.active(request)),
                metrics={"loss/total": 0.25},
                logprobs=[floats(*[-1.0] * length(row.sequence.completion)) for row in request.sequences],
                pending_gradients=self.fake.gradients,
            )

        return self.fake.answer("ForwardBackward", request, context, lambda: self.fake.once(request, work))

    def OptimStep(self, request, context):
        def work():
            applied, self.fake.gradients = self.fake.gradients, 0
            if request.HasField("client_state"):
                self.fake.client_states[request.adapter or self.fake.active(request)] = request.client_state
            return training_pb2.OptimStepResponse(
                adapter=version(request.adapter or self.fake.active(request), 8),
                grad_norm=1.5,
                gradients_applied=applied,
            )

        return self.fake.answer("OptimStep", request, context, lambda: self.fake.once(request, work))


EARLY = object()
"""A failure of an upload before its data was read."""


class Adapters(Servicer, adapters_pb2_grpc.AdapterServiceServicer):
    def _put(self, request, **facts):
        memory = types_pb2.AdapterMemory(weights_bytes=1_500_000, gradient_bytes=1000)
        facts |= {"version": 7, "parameter_count": 375_000, "resident": True}
        adapter = types_pb2.Adapter(name=request.name, memory=memory, **facts)
        self.fake.adapters[request.name] = adapter
        return adapter

    def CreateAdapter(self, request, context):
        def work():
            return self._put(
                request, kind=types_pb2.ADAPTER_KIND_POLICY, lora=request.lora, value_head=request.value_head
            )

        return self.fake.answer("CreateAdapter", request, context, lambda: self.fake.once(request, work))

    def LoadAdapter(self, request, context):
        def work():
            labels = int(request.kind == types_pb2.ADAPTER_KIND_REWARD)
            eos = {"append_eos": request.append_eos} if request.HasField("append_eos") else {}
            return self._put(
                request,
                kind=request.kind,
                source=request.path,
                value_head=request.value_head,
                num_labels=labels,
                pooling=request.pooling,
                **eos,
            )

        return self.fake.answer("LoadAdapter", request, context, lambda: self.fake.once(request, work))

    def _find(self, request, context):
        if request.name not in self.fake.adapters:
            failure = Failure(
                grpc.StatusCode.NOT_FOUND, f"no adapter {request.name!r}", reason="ADAPTER_NOT_FOUND", field="name"
            )
            context.abort_with_status(failure.status())
        return self.fake.adapters[request.name]

    def GetAdapter(self, request, context):
        return self.fake.answer("GetAdapter", request, context, lambda: self._find(request, context))

    def ListAdapters(self, request, context):
        def work():
            there = [a for _, a in sorted(self.fake.adapters.items()) if request.kind in (0, a.kind)]
            return adapters_pb2.ListAdaptersResponse(adapters=there)

        return self.fake.answer("ListAdapters", request, context, work)

    def DeleteAdapter(self, request, context):
        def work():
            self._find(request, context)
            del self.fake.adapters[request.name]
            return adapters_pb2.DeleteAdapterResponse()

        return self.fake.answer("DeleteAdapter", request, context, work)

    def SaveAdapter(self, request, context):
        def work():
            self._find(request, context)
            return adapters_pb2.SaveAdapterResponse(
                path=f"/adapters/{request.path}", adapter=version(request.name), bytes=1_501_000
            )

        return self.fake.answer("SaveAdapter", request, context, work)

    def CheckpointAdapter(self, request, context):
        def work():
            name = request.name or self.fake.active(request)
            self._keep(request, name)
            return adapters_pb2.CheckpointAdapterResponse(adapter=version(name))

        return self.fake.answer("CheckpointAdapter", request, context, work)

    def _keep(self, request, name):
        if request.HasField("client_state"):
            self.fake.client_states[name] = request.client_state

    def GetClientState(self, request, context):
        def work():
            state = self.fake.client_states.get(request.name, b"")
            return adapters_pb2.GetClientStateResponse(adapter=version(request.name), client_state=state)

        return self.fake.answer("GetClientState", request, context, work)

    def UploadAdapter(self, request_iterator, context):
        first = next(request_iterator)
        if self.fake.failures["UploadAdapter"] and self.fake.failures["UploadAdapter"][0] is EARLY:
            self.fake.failures["UploadAdapter"].popleft()
            context.abort_with_status(Failure(grpc.StatusCode.UNAVAILABLE, "gone").status())
        data = b"".join(request.data for request in request_iterator)

        def work():
            self.fake.uploads[first.header.name] = data
            return self._put(first.header, kind=first.header.kind, source="uploaded")

        return self.fake.answer("UploadAdapter", first.header, context, lambda: self.fake.once(first.header, work))

    def DownloadAdapter(self, request, context):
        self.fake.answer("DownloadAdapter", request, context, lambda: self._find(request, context))
        yield from self.fake.download
