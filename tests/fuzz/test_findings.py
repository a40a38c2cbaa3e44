"""What the fuzzers make of how inputs end: which refusals explain nothing, what counts as broken, what as tried."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from fuzz.calls import explained
from fuzz.findings import FEWEST_JUDGED, IN_SESSION, LEAST_OK, OK, Findings
from fuzz.grammar import METHODS
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

GENERATE, CHECK = "/onebase.v1.InferenceService/Generate", "/grpc.health.v1.Health/Check"
INFO = error_details_pb2.ErrorInfo(reason="OUT_OF_RANGE", domain="onebase")


def refusal(
    *infos: error_details_pb2.ErrorInfo, code: grpc.StatusCode = grpc.StatusCode.NOT_FOUND, inner: str = "no"
) -> grpc.RpcError:
    """As a client gets it: with details if there are any."""
    status = status_pb2.Status(code=code.value[0], message=inner)
    for info in infos:
        detail = any_pb2.Any()
        detail.Pack(info)
        status.details.append(detail)
    metadata = [("grpc-status-details-bin", status.SerializeToString())] if infos else []
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), details="no")


def test_a_refusal_of_ours_is_told_by_its_code_and_reason() -> None:
    told = explained(GENERATE, refusal(INFO))
    assert (told.code, told.problem) == ("NOT_FOUND OUT_OF_RANGE", None)


@pytest.mark.parametrize(
    "error",
    [
        refusal(),
        refusal(code=grpc.StatusCode.RESOURCE_EXHAUSTED),  # what comes of a status that is too long for its metadata
        refusal(INFO, INFO),
        refusal(error_details_pb2.ErrorInfo(reason="OUT_OF_RANGE", domain="other")),
        refusal(error_details_pb2.ErrorInfo(reason="out of range", domain="onebase")),
        refusal(error_details_pb2.ErrorInfo(domain="onebase")),
        refusal(INFO, inner="another message than the status has"),
    ],
)
def test_one_that_does_not_say_why_is_a_finding(error: grpc.RpcError, tmp_path: Path) -> None:
    problem = explained(GENERATE, error).problem
    assert problem is not None
    findings = Findings(tmp_path)
    findings.add("calls", problem)
    assert findings.written()["unexplained"] == findings.written()["crashes"] == 1


def test_healths_own_refusal_needs_no_explanation_and_others_of_health_do() -> None:
    assert explained(CHECK, refusal()).problem is None
    assert explained(CHECK, refusal(code=grpc.StatusCode.UNAUTHENTICATED)).problem is not None


def test_crashes_are_all_that_was_broken_and_its_kinds_stand_beside_it(tmp_path: Path) -> None:
    findings = Findings(tmp_path)
    for problem in ("crash: it ended", "hang: no answer", "hang: health", "INTERNAL: internal error 1", "Internal: x"):
        findings.add("calls", problem, number=7)
    found = findings.written()
    assert (found["crashes"], found["hangs"], found["internal"], found["unexplained"]) == (5, 2, 2, 0)
    assert len(list(tmp_path.glob("*.json"))) == 5


def tried(tmp_path: Path, method: str, count: int, done: int) -> Findings:
    """Calls of a method, of which so many were carried out."""
    findings = Findings(tmp_path)
    for number in range(count):
        findings.by_target["calls"]["inputs"] += 1
        findings.ended("calls", OK if number < done else "NOT_FOUND SESSION_NOT_FOUND", f"/x/{method}")
    return findings


def test_a_run_in_which_all_is_refused_has_tried_nothing(tmp_path: Path) -> None:
    refused = tried(tmp_path, "Generate", 1000, 0).refused()
    assert [line.partition(":")[0] for line in refused] == ["calls", "in the session"]
    assert tried(tmp_path, "Generate", FEWEST_JUDGED - 1, 0).refused() == []
    assert tried(tmp_path, "Generate", 1000, 170).refused() == []


def test_answers_of_methods_that_need_no_session_do_not_hide_that_it_is_gone(tmp_path: Path) -> None:
    findings = tried(tmp_path, "GetStatus", 1000, 900)
    assert findings.refused() == []
    for _ in range(FEWEST_JUDGED):
        findings.ended("calls", "NOT_FOUND SESSION_NOT_FOUND", "/x/Score")
    (line,) = findings.refused()
    assert line.startswith("in the session: 0 of")


def test_inputs_whose_end_nobody_told_were_not_carried_out(tmp_path: Path) -> None:
    findings = Findings(tmp_path)
    findings.by_target["files"]["inputs"] = FEWEST_JUDGED
    assert [line.partition(":")[0] for line in findings.refused()] == ["files"]


def test_every_floor_has_a_target_and_every_method_of_the_session_is_one() -> None:
    assert set(LEAST_OK) - {"in the session"} <= set(Findings(Path()).by_target)
    assert set(IN_SESSION) <= {method.name for method in METHODS}
