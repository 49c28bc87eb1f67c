"""A Ray of our own that does not come up in time."""

import subprocess
import time

import psutil
import pytest

from actors.errors import RunError
from orchestrator.cluster.ray_connection import START_ATTEMPTS, _command_of, own_daemons, started

LATE = Exception("The current node timed out during startup. This could happen because some of the raylet failed ...")


class Slow:
    """Comes up at the attempt of that number."""

    def __init__(self, comes_up_at: int, error: Exception = LATE) -> None:
        self.comes_up_at, self.error = comes_up_at, error
        self.attempts = self.cleaned = 0
        self.warnings: list[str] = []

    def start(self) -> str:
        self.attempts += 1
        if self.attempts < self.comes_up_at:
            raise self.error
        return "up"

    def clean_up(self) -> None:
        self.cleaned += 1


def test_a_ray_that_misses_its_own_time_limit_is_started_again_with_a_message():
    ray = Slow(comes_up_at=3)
    assert started(ray.start, ray.clean_up, ray.warnings.append) == "up"
    assert (ray.attempts, ray.cleaned) == (3, 2)
    assert "Ray did not start within its 30 s (load" in ray.warnings[0] and "attempt 2 of 3" in ray.warnings[0]


def test_a_ray_that_never_starts_is_an_error_of_a_few_lines():
    ray = Slow(comes_up_at=100)
    with pytest.raises(RunError, match=r"within its 30 s, 3 times: .*cluster\.address") as raised:
        started(ray.start, ray.clean_up, ray.warnings.append)
    assert (ray.attempts, ray.cleaned) == (START_ATTEMPTS, START_ATTEMPTS)
    assert raised.value.__cause__ is None


def test_another_error_of_its_start_is_not_tried_again():
    ray = Slow(comes_up_at=2, error=ConnectionError("nobody there"))
    with pytest.raises(ConnectionError):
        started(ray.start, ray.clean_up, ray.warnings.append)
    assert ray.attempts == 1


def test_a_daemon_that_ends_during_the_search_is_not_listed():
    with subprocess.Popen(["true"]) as ended:
        child = psutil.Process(ended.pid)
        while child.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert _command_of(child) == "" and own_daemons() == ()
    assert _command_of(child) == ""
