"""An HTTP server of rewards in a process of its own, with every fault that one may have. The path says which:

/score                       2 plus the length of each completion; null for one that begins with "x"
/FAULT                       one of FAULTS below, at each call
/first/FAULT/N/KEY           that fault at the first N calls with that key, /score after them
/every/KEY                   every second call has a fault, each time another one; the rest are scored
/calls (GET)                 what was asked: [{"path", "headers", "body", "fault", "scores"}]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

HANG_S = 30.0
Scores = list[Any]


def scores_of(completions: list[Any]) -> Scores:
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [None if text.startswith("x") else 2.0 + len(text) for text in texts]


def answer(scores: Any, version: Any = 1) -> bytes:
    return json.dumps({"version": version, "scores": scores, "more": "is ignored"}).encode()


BODIES = {  # of an answer with status 200 that is none
    "garbage": lambda scores: b"<html>Bad gateway</html>",
    "binary": lambda scores: b"\xff\xfe\x00",
    "empty": lambda scores: b"",
    "nothing": lambda scores: b"null",
    "bare": lambda scores: json.dumps(scores).encode(),
    "nan": lambda scores: answer([float("nan")] * len(scores)),
    "infinite": lambda scores: answer([float("inf")] * len(scores)),
    "short": lambda scores: answer(scores[:-1]),
    "long": lambda scores: answer([*scores, 1.0]),
    "words": lambda scores: answer(["good"] * len(scores)),
    "digits": lambda scores: answer(["1"] * len(scores)),
    "one": lambda scores: answer(1.0),
    "named": lambda scores: answer({str(n): 1.0 for n in range(len(scores))}),
    "nested": lambda scores: answer([[1.0]] * len(scores)),
    "deep": lambda scores: b'{"version": 1, "scores": ' + b"[" * 100_000,
    "future": lambda scores: answer(scores, version=2),
    "large": lambda scores: answer(scores) + b" " * 5 * 2**20,
}
FAULTS = (*BODIES, "hangs", "trickles", "breaks", "dies", "redirects")  # and each HTTP status


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    lock = threading.Lock()
    calls: ClassVar[list[dict[str, Any]]] = []
    counted: ClassVar[Counter[str]] = Counter()
    every = ("garbage", "500", "nan", "short", "words", "breaks")

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_GET(self) -> None:
        self._send(200, json.dumps(self.calls).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        scores = scores_of(body["completions"])
        fault = self._fault()
        with self.lock:
            given = None if fault else scores
            seen = {"path": self.path, "headers": dict(self.headers), "body": body, "fault": fault, "scores": given}
            self.calls.append(seen)
        if fault is None:
            self._send(200, answer(scores))
        elif fault in BODIES:
            self._send(200, BODIES[fault](scores))
        else:
            self.fails(fault, scores)

    def fails(self, fault: str, scores: Scores) -> None:
        if fault.isdigit():
            self._send(int(fault), b"the model is being loaded", **{"Retry-After": "0"})
        else:
            getattr(self, fault)(scores)

    def _fault(self) -> str | None:
        _, kind, *rest = self.path.partition("?")[0].split("/")
        with self.lock:
            self.counted[self.path] += 1
            count = self.counted[self.path]
        if kind == "first":
            return rest[0] if count <= int(rest[1]) else None
        if kind == "every":
            return self.every[count // 2 % len(self.every)] if count % 2 else None
        return None if kind == "score" else kind

    def hangs(self, scores: Scores) -> None:
        time.sleep(HANG_S)

    def trickles(self, scores: Scores) -> None:
        """Never silent for long, and never done."""
        text = answer(scores)
        self._head(200, len(text) + 1000)
        self.wfile.write(text)
        for _ in range(int(HANG_S / 0.05)):
            time.sleep(0.05)
            self.wfile.write(b" ")
            self.wfile.flush()

    def breaks(self, scores: Scores) -> None:
        self._head(200, 1000)
        self.wfile.write(answer(scores)[:10])
        self.close_connection = True

    def dies(self, scores: Scores) -> None:
        os._exit(9)

    def redirects(self, scores: Scores) -> None:
        self._send(307, b"", Location="/score")

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self._head(status, len(body), **headers)
        self.wfile.write(body)

    def _head(self, status: int, length: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()


class RewardServer:
    """A handle on the process; `port` may be given to one that takes another's place."""

    def __init__(self, port: int = 0, program: str = __file__) -> None:
        command = [sys.executable, program, str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def url(self, path: str = "score") -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    def calls(self, path: str) -> list[dict[str, Any]]:
        """What was asked at a path."""
        with urllib.request.urlopen(self.url("calls"), timeout=50) as response:
            return [call for call in json.load(response) if call["path"] == f"/{path}"]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=50)
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def reward_server(port: int = 0, program: str = __file__) -> Iterator[RewardServer]:
    server = RewardServer(port, program)
    try:
        yield server
    finally:
        server.kill()


def serve(handler: type[Handler], port: int) -> None:
    """Until this process is killed. Prints the port; 0: any that is free."""
    ThreadingHTTPServer.daemon_threads = True
    listening = ThreadingHTTPServer(("127.0.0.1", port), handler)
    print(listening.server_port, flush=True)
    listening.serve_forever()


if __name__ == "__main__":
    serve(Handler, int(sys.argv[1]))
