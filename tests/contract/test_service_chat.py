"""The `openai` client as it is talks to the policy of a run in progress, through the service."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.cli import main
from orchestrator.service.app import create_app
from orchestrator.service.settings import Settings
from tests.runs import ARITHMETIC, merged
from tests.service_client import AUTHORIZED, TOKEN, listening

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.timeout(600)

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
CHANGES = {
    "train": {"steps": 100_000},
    "roles": {"rollout": {"engine": "hf", "cpus": 0.1}},
    "sampling": {"max_tokens": 40},
}
SUM = [{"role": "user", "content": "12+34="}]
GREEDY: dict[str, Any] = {"messages": SUM, "temperature": 0}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a service with a run `chat`, which is paused: its weights are the same for the whole module."""
    where = tmp_path_factory.mktemp("chat")
    (where / "template.jinja").write_text(TEMPLATE)
    recipe = merged(ARITHMETIC, {**CHANGES, "model": {"chat_template": str(where / "template.jinja")}})
    with listening(create_app(Settings(where / "runs", token=TOKEN, local=True))) as url:
        http = httpx.Client(base_url=url, headers=AUTHORIZED, timeout=300)
        assert http.post("/v1/runs", json={"name": "chat", "recipe": recipe}).status_code == 201
        try:
            deadline = time.monotonic() + 300
            while not http.get("/v1/runs/chat/metrics").json()["lines"]:
                detail = http.get("/v1/runs/chat").json()
                assert detail["state"] in ("starting", "running") and time.monotonic() < deadline, detail["detail"]
                time.sleep(0.1)
            assert http.patch("/v1/runs/chat", json={"paused": True}).json()["state"] == "paused"
            yield url
        finally:
            http.post("/v1/runs/chat/stop?now=true")


@pytest.fixture
def client(url: str) -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0, timeout=300)


def test_the_policy_of_a_run_is_a_model_that_answers_with_what_it_samples(client: Any):
    assert [model.id for model in client.models.list()] == ["chat", "chat/rollout"]
    answer = client.chat.completions.create(model="chat", **GREEDY)
    [choice] = answer.choices
    assert (answer.model, choice.message.role, answer.usage.prompt_tokens) == ("chat", "assistant", 6)
    assert answer.usage.completion_tokens >= len(choice.message.content) > 0
    assert choice.finish_reason == ("length" if answer.usage.completion_tokens == 40 else "stop")
    again = client.chat.completions.create(model="chat/rollout", **GREEDY)
    assert again.choices[0].message.content == choice.message.content, "greedy, of the same weights"
    short = client.chat.completions.create(model="chat", max_tokens=1, **GREEDY)
    assert (short.usage.completion_tokens, short.choices[0].finish_reason) == (1, "length")


def test_a_stream_of_several_parts_says_what_the_whole_answer_says(client: Any):
    """At a temperature, because a greedy answer may be one part; the seed fixes each part. A model that has learned
    nothing says bytes: a character that is not whole yet is kept back."""
    asked: dict[str, Any] = {"model": "chat", "messages": SUM, "temperature": 2.0, "stream": True}
    lengths = set[int]()
    for seed in range(6):
        parts = list(client.chat.completions.create(**asked, seed=seed, stream_options={"include_usage": True}))
        said = [part.choices[0].delta.content for part in parts if part.choices and part.choices[0].delta.content]
        ended = [part.choices[0].finish_reason for part in parts if part.choices]
        assert ended[-1] in ("stop", "length") and set(ended[:-1]) == {None}
        assert parts[-1].usage.completion_tokens <= 40
        repeated = client.chat.completions.create(**asked, seed=seed)
        assert said == [part.choices[0].delta.content for part in repeated if part.choices[0].delta.content]
        lengths.add(len(said))
    assert max(lengths) > 1
    greedy = client.chat.completions.create(model="chat", **GREEDY).choices[0].message.content
    streamed = client.chat.completions.create(model="chat", **GREEDY, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in streamed) == greedy


def test_a_stop_string_ends_the_answer_before_it(client: Any):
    whole = client.chat.completions.create(model="chat", **GREEDY).choices[0].message.content
    cut = client.chat.completions.create(model="chat", **GREEDY, stop=[whole[0]]).choices[0]
    assert (cut.message.content, cut.finish_reason) == ("", "stop")


def test_chats_at_the_same_time_are_all_answered(client: Any):
    def one(seed: int) -> str:
        answer = client.chat.completions.create(model="chat", messages=SUM, seed=seed, temperature=1.5, max_tokens=8)
        return answer.choices[0].message.content

    with ThreadPoolExecutor(16) as clients:
        at_once = list(clients.map(one, range(16)))
    assert at_once == [one(seed) for seed in range(16)]
    assert len(set(at_once)) > 1, "a seed changes something"


@pytest.mark.parametrize(
    ("changes", "error", "part"),
    [
        ({"model": "nothing"}, "NotFoundError", "there is no run"),
        ({"model": "../chat"}, "NotFoundError", "there is no run"),
        ({"model": "chat/teacher"}, "NotFoundError", "there is chat, chat/rollout"),
        ({"n": 2}, "BadRequestError", "n=2 is not supported"),
        ({"logprobs": True}, "BadRequestError", "logprobs"),
        ({"temperature": 9}, "BadRequestError", "temperature"),
        ({"max_tokens": 0}, "BadRequestError", "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "BadRequestError", "stop"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "BadRequestError", "not text"),
        ({"messages": []}, "UnprocessableEntityError", "messages"),
    ],
)  # fmt: skip
def test_what_a_live_policy_cannot_do_is_refused(client: Any, changes: dict[str, Any], error: str, part: str):
    with pytest.raises(getattr(openai, error)) as refused:
        client.chat.completions.create(**{"model": "chat", "messages": SUM, **changes})
    assert part in refused.value.body["message"]


def test_the_command_prints_what_the_policy_says(
    client: Any, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
):
    said = client.chat.completions.create(model="chat", **GREEDY).choices[0].message.content
    with pytest.raises(SystemExit) as ended:
        main(["chat", str(run_folder(tmp_path_factory)), "-m", "12+34=", "--temperature", "0"])
    assert (ended.value.code, capsys.readouterr().out) == (0, said + "\n")
    with pytest.raises(SystemExit) as ended:
        main(["chat", str(run_folder(tmp_path_factory)), "-m", "1", "--role", "teacher"])
    assert ended.value.code == 1 and "there is chat, chat/rollout" in capsys.readouterr().err


def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    [folder] = {found.resolve() for found in Path(tmp_path_factory.getbasetemp()).glob("chat*/runs/chat")}
    return folder


def test_the_services_token_is_the_api_key(url: str):
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="another-key-0123456789", max_retries=0).models.list()


def test_a_run_that_is_over_is_no_model_any_more(client: Any, url: str):
    stopped = httpx.post(f"{url}/v1/runs/chat/stop", headers=AUTHORIZED, timeout=300).json()
    assert stopped["state"] == "stopped"
    assert list(client.models.list()) == []
    with pytest.raises(openai.ConflictError, match="only a run in progress"):
        client.chat.completions.create(model="chat", messages=SUM)


def test_the_folder_of_a_run_that_can_be_chatted_with_is_private(url: str, tmp_path_factory: pytest.TempPathFactory):
    folder = run_folder(tmp_path_factory)
    assert folder.stat().st_mode & 0o077 == 0, "its run.json has the address of the chat"
