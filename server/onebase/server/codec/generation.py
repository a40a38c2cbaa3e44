"""Generate: its request as a job's parts, and a chunk of a completion as a response."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onebase.server.access import Named, need_value_head
from onebase.server.codec.fields import version
from onebase.server.codec.sampling import Draws, read_sampling
from onebase.server.codec.sequences import SequenceReader
from onebase.server.codec.tensors import float_tensor, int_tensor
from onebase.server.jobs import BaseFacts, CompletionChunk, FinishReason, GenerateJob, Tokens
from onebase.v1 import inference_pb2, types_pb2

_FINISH_REASONS = {
    None: inference_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.EOS: inference_pb2.FINISH_REASON_EOS,
    FinishReason.STOP_STRING: inference_pb2.FINISH_REASON_STOP_STRING,
    FinishReason.STOP_TOKEN: inference_pb2.FINISH_REASON_STOP_TOKEN,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}


@dataclass(frozen=True)
class Generation:
    """A checked request of Generate."""

    request: inference_pb2.GenerateRequest
    adapter: Named
    prompts: list[Tokens]
    draws: Draws

    def job(self, emit: Callable[[CompletionChunk], None]) -> GenerateJob:
        """The job; `emit` is called on the worker's thread."""
        return GenerateJob(
            adapter=self.adapter.uid,
            prompts=self.prompts,
            sampling=self.draws.sampling,
            emit=emit,
            n=self.draws.n,
            version=version(self.request, "adapter_version"),
            return_logprobs=self.request.return_logprobs,
            return_values=self.request.return_values,
            stream_tokens=self.request.stream_tokens,
        )

    def response(self, chunk: CompletionChunk) -> inference_pb2.GenerateResponse:
        """One message of the stream."""
        return inference_pb2.GenerateResponse(
            prompt_index=chunk.prompt_index,
            completion_index=chunk.completion_index,
            text=chunk.text,
            tokens=int_tensor(chunk.tokens),
            logprobs=float_tensor(chunk.logprobs) if self.request.return_logprobs else None,
            values=float_tensor(chunk.values) if self.request.return_values else None,
            finish_reason=_FINISH_REASONS[chunk.finish_reason],
            adapter=types_pb2.AdapterVersion(name=self.adapter.name, version=chunk.version),
            seed=self.draws.sampling.seed,
            prompt_tokens=self.prompts[chunk.prompt_index].size,
        )


async def read_generation(
    request: inference_pb2.GenerateRequest, adapter: Named, reader: SequenceReader, facts: BaseFacts
) -> Generation:
    """Checks a request of Generate whose adapter is known.

    Raises:
        InvalidArgument: naming the field.
        FailedPrecondition: NO_VALUE_HEAD.
    """
    version(request, "adapter_version")
    if request.return_values:
        need_value_head(adapter, "return_values")
    draws = read_sampling(request.sampling, facts)
    prompts = await reader.prompts(request.prompts, draws.n, draws.sampling.max_new_tokens)
    return Generation(request, adapter, prompts, draws)
