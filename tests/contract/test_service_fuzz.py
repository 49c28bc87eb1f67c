"""The service, asked whatever its own OpenAPI schema allows, and what it does not: no answer is a failure of the
service, and none has a status, a type or a form that the schema does not name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from orchestrator.service.app import create_app
from orchestrator.service.jobs import JobState
from orchestrator.service.settings import Settings
from tests.live_driver import live
from tests.service_client import AUTHORIZED, TOKEN, write_run, write_samples

schemathesis = pytest.importorskip("schemathesis")
pytestmark = pytest.mark.timeout(600)

ALL = list(hypothesis.HealthCheck)
CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")


class NoJobs:
    """A Ray on which every job ends at once."""

    def clear(self, run: str, folder: Path) -> None: ...

    def submit(self, run: str, folder: Path, command: Sequence[str], *, stop_wait_s: float) -> None: ...

    def states(self, folders: Mapping[str, Path]) -> dict[str, JobState]:
        return dict.fromkeys(folders, JobState.ENDED)

    def reserved(self) -> None: ...

    def kill(self, run: str, folder: Path) -> None: ...

    def ready(self) -> None: ...


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of a service with a run that is over, and one that is in progress."""
    runs = tmp_path_factory.mktemp("runs")
    finished = {"event": "finished", "time": 1010.0}
    for name, events in (("over", [finished]), ("live", [])):
        folder = write_run(runs, name, events=events, metrics=[{"step": 1, "loss": 2.0, "reward": float("nan")}])
        write_samples(folder, 1, [0.5, None])
        (folder / "console.log").write_text("step 1\n")
    app = create_app(Settings(runs, token=TOKEN), NoJobs())
    with live(runs / "live"):
        yield schemathesis.openapi.from_asgi("/openapi.json", app, headers=AUTHORIZED)


def aimed(case: Any, run: str, can_be_done: bool) -> None:
    """Change a request so that it is one about that run. `can_be_done`: and, as far as it goes, one that the run in
    progress can carry out, which what is drawn at random almost never is."""
    if case.path_parameters:
        case.path_parameters["run"] = run
    given = case.query if isinstance(case.query, dict) else {}
    if case.path.endswith("/stop"):
        case.query = {**given, "wait_s": 0.2}  # this driver does not stop
    elif run == "live" and given.get("follow"):
        case.query = {**given, "follow": False}  # it has no end
    elif "wait_s" in given:
        case.query = {**given, "wait_s": 30}
    if not can_be_done or not isinstance(case.body, dict):
        return
    if case.method == "PATCH":
        case.body.pop("priority", None)  # no service was asked for the run
        case.body.setdefault("scale", {"rollout": 1})
        if not case.body.get("attach"):
            case.body.pop("detach", None)
    if isinstance(case.body.get("scale"), dict):
        case.body["scale"] = dict.fromkeys(["rollout"], next(iter(case.body["scale"].values()), 1))
    engines = case.body.get("attach")
    for each in engines if isinstance(engines, list) else []:
        if isinstance(each, dict):
            each |= {"address": "127.0.0.1:9", "role": "rollout"}
    if case.body.get("detach"):
        case.body["detach"] = ["127.0.0.1:9"]
    if "messages" in case.body:
        case.body |= {"model": run, "messages": [{"role": "user", "content": "1+1="}]}


# The run that requests are about, None: any; and whether it can do what is asked.
ABOUT = ((None, False), ("over", False), ("over", True), ("live", False), ("live", True))
# The statuses that are seen at least, of requests as the schema has them and of others.
SEEN = {
    "POSITIVE": {
        "GET /v1/runs": {200},
        "GET /v1/runs/{run}": {200, 404},
        "GET /v1/runs/{run}/samples": {200, 404},
        "PATCH /v1/runs/{run}": {200, 404, 409, 422},
        "POST /v1/runs/{run}/checkpoint": {200, 404, 409},
        "POST /v1/runs/{run}/stop": {200, 404},
        "POST /v1/runs/{run}/resume": {404, 409},
        "GET /v1/models": {200},
        "POST /v1/chat/completions": {200, 400, 404, 409},
        "GET /v1/methods": {200},
        "POST /v1/plan": {422},
    },
    "NEGATIVE": {
        "GET /v1/runs/{run}/metrics": {422},
        "POST /v1/runs": {422},
        "PATCH /v1/runs/{run}": {422},
        "POST /v1/chat/completions": {422},
    },
}


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_no_answer_is_a_failure_or_one_that_the_schema_does_not_name(schema: Any, mode: str):
    checks = [getattr(schemathesis.checks, name) for name in CHECKS]
    statuses: dict[str, set[int]] = {}
    for operation in (found.ok() for found in schema.get_all_operations()):

        @hypothesis.settings(max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=ALL)
        @hypothesis.given(operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
        def asked(known: str | None, can_be_done: bool, case: Any) -> None:
            if known is not None:
                aimed(case, known, can_be_done)
            answer = case.call(headers=AUTHORIZED)
            statuses.setdefault(operation.label, set()).add(answer.status_code)  # noqa: B023  it is called in this turn
            case.validate_response(answer, checks=checks)

        for about in ABOUT:
            try:
                asked(*about)
            except hypothesis.errors.Unsatisfiable:  # nothing that such a route could refuse
                assert mode == "NEGATIVE"
    missed = {label: wanted - statuses.get(label, set()) for label, wanted in SEEN[mode].items()}
    assert {label: each for label, each in missed.items() if each} == {}, statuses
