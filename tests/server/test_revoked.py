"""Streams whose tokens are revoked while they go on."""

from __future__ import annotations

import grpc
import pytest
from server.harness import refusal_of, text_of
from server.tenants import Guarded
from server.test_files import FILES, header, upload

from onebase.server import guard
from onebase.server.jobs import GenerateJob
from onebase.v1 import adapters_pb2, inference_pb2


@pytest.fixture
def guarded(tmp_path):
    with Guarded(tmp_path) as server:
        yield server


def revoke(guarded, client):
    guarded.file.revoke(client.token.split("_")[1])


def told(answers):
    with pytest.raises(grpc.RpcError) as error:
        list(answers)
    return refusal_of(error.value)


def test_an_upload_whose_token_is_revoked_meanwhile_makes_no_adapter(guarded):
    red = guarded.as_("red")

    def parts():
        *most, last = upload(header())
        yield from most
        revoke(guarded, red)
        yield last

    with pytest.raises(grpc.RpcError) as error:
        red.adapters.UploadAdapter(parts())
    refusal = refusal_of(error.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_UNKNOWN")
    assert not guarded.as_("red").adapters.ListAdapters(adapters_pb2.ListAdaptersRequest()).adapters


def test_completions_end_with_their_token(guarded, monkeypatch):
    monkeypatch.setattr(guard, "LOOK_AGAIN_SECONDS", 0.0)
    guarded.worker.endless = True
    red = guarded.as_("red")
    request = inference_pb2.GenerateRequest(
        adapter="base", prompts=[text_of("a")], sampling={"max_new_tokens": 20}, stream_tokens=True
    )
    answers = red.inference.Generate(request)
    next(answers)
    revoke(guarded, red)
    assert told(answers).reason == "TOKEN_UNKNOWN"
    (job,) = guarded.worker.wait_submitted(GenerateJob)
    guarded.worker.wait_done(job)


def test_a_download_ends_with_its_token(guarded, monkeypatch):
    monkeypatch.setattr(guard, "LOOK_AGAIN_SECONDS", 0.0)
    red = guarded.as_("red")
    red.adapters.UploadAdapter(upload(header()))
    guarded.worker.written = {**FILES, "adapter_model.safetensors": bytes(64 * 2**20)}
    answers = red.adapters.DownloadAdapter(adapters_pb2.DownloadAdapterRequest(name="two"))
    next(answers)
    revoke(guarded, red)
    assert told(answers).reason == "TOKEN_UNKNOWN"
