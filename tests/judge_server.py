"""An OpenAI-compatible server in a process of its own, whose model is a rule: it reads the prompts of judges that come
with Troupe, and can be as unfit as a language model may be. As a base address `http://HOST:PORT/PATH/v1`:

/v1, /FAULT/v1, /first/FAULT/N/KEY/v1, /every/KEY/v1     as of `reward_server`; `said` in its record of calls is the
                                                         content of the answer, None if there was a fault

    python tests/judge_server.py 8000                    serves http://127.0.0.1:8000/v1

Of two answers to an arithmetic problem the right one is better; of others the longer one. The name of the model says
how it behaves: `fair`; `long`, to which the longer answer is always the better one; `first`, which always prefers what
is shown first; `mumbles`, of which nothing can be read; `moody`, which cannot be read about answers with an "x".
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.reward_server import Handler, RewardServer, reward_server, serve


def worth(request: str, answer: str) -> float:
    problem = re.fullmatch(r"\s*(\d+)\s*\+\s*(\d+)\s*=?\s*", request)
    if problem is None:
        return float(len(answer))
    return float(answer.strip() == str(int(problem[1]) + int(problem[2])))


def judgement(question: str, model: str) -> str:
    """What the model writes."""
    parts = dict(re.findall(r"(?s)\[([\w ]+)\]\n(.*?)\n\[end of \1\]", question))
    answers = [parts[name] for name in ("answer A", "answer B", "answer") if name in parts]
    worths = [float(len(answer)) if model == "long" else worth(parts["request"], answer) for answer in answers]
    if model == "mumbles" or (model == "moody" and any("x" in answer for answer in answers)):
        return "It depends. The verdict is open, and the score is 7 or so."
    if len(answers) == 2:
        first = model == "first" or worths[0] > worths[1]
        better = "A" if first else "tie" if worths[0] == worths[1] else "B"
        return f"Verdict: A would be rash. On reflection:\n**Verdict: {better}**"
    if "Score: NUMBER" in question:
        return f"A fair attempt.\nScore: {worths[0]:g}"
    return f"Verdict: {'yes' if worths[0] >= 1 else 'no'}"


def chat(content: Any) -> bytes:
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode()


BODIES = {  # of an answer with status 200
    "garbage": b"<html>Bad gateway</html>",
    "empty": b"",
    "nothing": b"null",
    "list": b"[]",
    "choiceless": b'{"choices": []}',
    "number": chat(7),
    "large": chat("x" * 5 * 2**20),
    "wordless": chat(None),  # no fault of the machinery: the model refused to answer, say
}


class JudgeHandler(Handler):
    every = ("garbage", "500", "breaks")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.path = self.path.removesuffix("/v1/chat/completions") or "/score"
        fault = self._fault()
        said = judgement(body["messages"][0]["content"], body["model"]) if fault is None else None
        with self.lock:
            self.calls.append(
                {"path": self.path, "headers": dict(self.headers), "body": body, "fault": fault, "said": said}
            )
        if said is not None:
            self._send(200, chat(said))
        elif fault in BODIES:
            self._send(200, BODIES[fault])
        elif fault == "401":
            self._send(401, f"Incorrect API key provided: {self.headers['Authorization']}".encode())
        else:
            self.fails(str(fault), [])


@contextmanager
def judge_server(port: int = 0) -> Iterator[RewardServer]:
    with reward_server(port, __file__) as server:
        yield server


if __name__ == "__main__":
    serve(JudgeHandler, int(sys.argv[1]))
