"""The service, asked whatever its own OpenAPI schema allows, and what it does not: no answer is a failure of the
service, and none has a status, a type or a form that the schema does not name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis.strategies import booleans

from orchestrator.service.app import create_app
from orchestrator.service.jobs import JobState
from orchestrator.service.settings import Settings
from tests.service_client import AUTHORIZED, TOKEN, write_run, write_samples

schemathesis = pytest.importorskip("schemathesis")
pytestmark = pytest.mark.timeout(600)

ALL = list(hypothesis.HealthCheck)
CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
LEFT_OUT = ("/v1/plan", "/v1/methods")  # each starts a process or imports torch; `test_service_plans.py` has them


class NoJobs:
    """A Ray on which every job ends at once."""

    def submit(self, run: str, folder: Path, command: Sequence[str], *, stop_wait_s: float) -> None: ...

    def states(self, folders: Mapping[str, Path]) -> dict[str, JobState]:
        return dict.fromkeys(folders, JobState.ENDED)

    def reserved(self) -> None: ...

    def kill(self, run: str, folder: Path) -> None: ...

    def ready(self) -> None: ...


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a service with a run that is over."""
    runs = tmp_path_factory.mktemp("runs")
    finished = {"event": "finished", "time": 1010.0}
    folder = write_run(runs, "t-1", events=[finished], metrics=[{"step": 1, "loss": 2.0, "reward": float("nan")}])
    write_samples(folder, 1, [0.5, None])
    (folder / "console.log").write_text("step 1\n")
    app = create_app(Settings(runs, token=TOKEN), NoJobs())
    return schemathesis.openapi.from_asgi("/openapi.json", app, headers=AUTHORIZED)


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_no_answer_is_a_failure_or_one_that_the_schema_does_not_name(schema: Any, mode: str):
    checks = [getattr(schemathesis.checks, name) for name in CHECKS]
    statuses: dict[str, set[int]] = {}
    for operation in (found.ok() for found in schema.get_all_operations()):
        if operation.path in LEFT_OUT:
            continue

        @hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=ALL)
        @hypothesis.given(operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode]), booleans())
        def asked(case: Any, known: bool) -> None:
            if case.path_parameters and known:
                case.path_parameters["run"] = "t-1"
            answer = case.call(headers=AUTHORIZED)
            statuses.setdefault(operation.label, set()).add(answer.status_code)  # noqa: B023  it is called in this turn
            case.validate_response(answer, checks=checks)

        try:
            asked()
        except hypothesis.errors.Unsatisfiable:  # nothing that such a route could refuse
            assert mode == "NEGATIVE"
    if mode == "POSITIVE":
        assert {200, 404} <= statuses["GET /v1/runs/{run}/samples"], "it asks about a run that there is, and of others"
        assert 200 in statuses["GET /v1/runs"] and 409 in statuses["PATCH /v1/runs/{run}"]
    else:
        assert 422 in statuses["GET /v1/runs/{run}/metrics"] and 422 in statuses["POST /v1/runs"]
