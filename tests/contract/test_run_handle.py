"""A run started, followed and steered from Python. Without Ray; `tests/ray/test_run_handle.py` does it with."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.errors import ConfigError, Interrupted, RunError, UserError
from orchestrator.api import attach, resume, start
from orchestrator.checkpoint import verify
from orchestrator.run_handle import RunHandle
from tests.runs import SFT
from tests.waiting import until

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def started(where: Path, **settings: Any) -> Iterator[RunHandle]:
    recipe = where / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**SFT, "output": str(where)}))
    handle = start(recipe, local=True, **settings)
    try:
        yield handle
    finally:
        handle.stop()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunHandle]:
    """A run that was started once for the tests of this file, the last of which ends it: a start takes ten seconds."""
    with started(tmp_path_factory.mktemp("run"), train__steps=100_000) as run:
        yield run


def test_clients_that_ask_for_opposites_at_the_same_time_are_all_answered_and_the_last_one_counts(run: RunHandle):
    next(run.metrics())
    with ThreadPoolExecutor() as clients:
        for last in ("pause", "resume", "pause"):
            first = "resume" if last == "pause" else "pause"
            asked = [clients.submit(getattr(attach(run.folder), first))]
            until(lambda: list((run.folder / "requests").glob("*.json")), "request", every_s=0.001)
            asked.append(clients.submit(getattr(attach(run.folder), last)))
            answers = [call.exception(timeout=600) or call.result() for call in asked]
            assert isinstance(answers[1], int)
            overtaken = "another client (let it go on|paused it) before run .* could answer"
            assert isinstance(answers[0], int) or re.match(overtaken, str(answers[0]))
            assert run.status().state == ("paused" if last == "pause" else "running")


def test_a_run_is_paused_saved_stopped_and_continued_from_inside_a_running_event_loop(run: RunHandle):
    """Its last process ends with its last step, and returns its result and all of its metrics and events."""

    async def notebook() -> None:
        run.resume()
        next(run.metrics())
        done = run.pause()
        assert run.status().state == "paused"
        assert run.pause() == done, "every request is answered"
        checkpoint = run.checkpoint()
        assert verify(checkpoint) is None
        assert checkpoint.name == f"step-{done:08d}", "the pause holds: no step was made since"
        assert run.status().step == done

        again = attach(run.folder)  # as a notebook that was restarted finds it
        assert again.resume() == done
        later = next(line for line in again.metrics() if line["step"] >= done + 3)
        assert later["phase"] == "sft" and "loss" in later
        saved = again.checkpoint()
        assert int(saved.name.removeprefix("step-")) >= done + 3
        with pytest.raises(UserError, match="in one process"):
            again.scale("rollout", 2)

        last = again.stop()
        assert last is not None and verify(last) is None
        assert not again.running
        with pytest.raises(Interrupted):
            run.result()
        with pytest.raises(RunError, match="has ended: stopped by SIGTERM; `troupe resume"):
            run.pause()
        assert run.stop() == last, "stopping twice is fine"

        stopped = int(last.name.removeprefix("step-"))
        with pytest.raises(ConfigError, match=r"train\.stepz"):
            resume(run.folder, local=True, train__stepz=1)
        longer = resume(run.folder, local=True, train__steps=stopped + 2)
        steps = [line["step"] for line in longer.metrics()]  # while it runs, to its end
        kinds = [event["event"] for event in longer.events()]
        result = longer.result()
        assert steps == [line["step"] for line in run.metrics()] == list(range(1, stopped + 3))
        assert kinds[0] == "prepared" and kinds[-1] == "finished"
        assert result.folder == run.folder
        assert result.model == run.folder / "checkpoints" / f"step-{stopped + 2:08d}" / "model"
        assert (result.model / "config.json").is_file()
        assert result.picture is None and not (run.folder / "curves.png").exists(), "logging.curves is false"
        assert run.status().state == "finished"

    asyncio.run(notebook())


def test_a_run_whose_data_is_refused_raises_the_message_that_the_command_prints(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl") as refused, started(tmp_path, data__path="nowhere.jsonl"):
        pass
    assert "Traceback" not in str(refused.value)
    assert not list(tmp_path.glob(".console-*")), "what a refused run printed is in the error"


def test_the_example_in_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n((?:(?!```).)*troupe\.start\(.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(tmp_path)

    async def notebook() -> None:
        exec(code, {})

    asyncio.run(notebook())
    *lines, model = capsys.readouterr().out.splitlines()
    losses = dict(line.split() for line in lines if not line.endswith("None"))
    assert list(losses) == [str(step) for step in range(1, 21)]
    assert float(losses["20"]) < float(losses["1"])
    assert (Path(model) / "config.json").is_file()
