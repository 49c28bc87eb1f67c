"""Gloo groups that share a device, and with it the thread that wakes a hundred times a second."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from actors.gloo_devices import shared_gloo_device
from tests.waiting import until

TIMEOUT = timedelta(seconds=20)


def device_threads() -> int:
    return sum(_name(task) == "gloo_tcp_loop\n" for task in Path("/proc/self/task").iterdir())


def _name(task: Path) -> str:
    try:
        return (task / "comm").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has ended since the list was made
        return ""


def groups(count: int) -> list[dist.ProcessGroup]:
    """As vLLM makes its own: of the torch.distributed that this process has."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=TIMEOUT)
    return [dist.new_group([0], timeout=TIMEOUT, backend="gloo") for _ in range(count)]  # pyright: ignore


def test_groups_made_meanwhile_have_one_device_and_work() -> None:
    plain = distributed_c10d.ProcessGroupGloo
    before = device_threads()
    try:
        with shared_gloo_device():
            made = groups(3)
        for group in made:
            values = torch.arange(3.0)
            dist.broadcast(values, 0, group=group)
            gathered = [torch.zeros(3)]
            dist.all_gather(gathered, values, group=group)
            assert torch.equal(gathered[0], torch.arange(3.0))
        assert distributed_c10d.ProcessGroupGloo is plain
        alone = dist.new_group([0], timeout=TIMEOUT, backend="gloo")
        until(lambda: device_threads() >= before + 2, "device of the group that was made later", timeout_s=10)
        dist.barrier(alone)
        assert device_threads() == before + 2, "one for the three, and one for the last"
    finally:
        dist.destroy_process_group()


def test_an_interface_that_the_user_chose_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = distributed_c10d.ProcessGroupGloo
    with shared_gloo_device():
        assert distributed_c10d.ProcessGroupGloo is not plain
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with shared_gloo_device():
        assert distributed_c10d.ProcessGroupGloo is plain
