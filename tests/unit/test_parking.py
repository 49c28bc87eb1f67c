"""Sleep and wake without an accelerator: the same way on the CPU's memory, which every backend holds alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actors.backends import Placement, build_backend
from actors.backends.parking import Parked, tensors_below
from actors.backends.placement import device_of
from actors.errors import ConfigError, RunError
from actors.model import ModelSpec
from actors.model_worker import ModelWorker
from actors.specs import BackendSpec, OptimSpec
from tests.unit.tiny import tiny_model_folder

CPU = torch.device("cpu")
OPTIM = OptimSpec(learning_rate=1e-2, total_steps=4)


def test_parked_tensors_take_no_memory_and_return_to_the_same_tensors() -> None:
    flat = torch.arange(12.0)
    weight = torch.nn.Parameter(flat.view(3, 4))
    weight.grad = torch.ones(3, 4)
    moments = {"state": {weight: {"exp_avg": torch.full((3, 4), 2.0), "step": 7}}}
    parked = Parked(CPU, [moments])
    assert parked.nbytes == 3 * 12 * 4, "the weight that a dictionary is keyed by, its gradient, and its moment"
    assert flat.untyped_storage().nbytes() == 0 and weight.grad.untyped_storage().nbytes() == 0
    parked.take_back()
    assert torch.equal(weight, torch.arange(12.0).view(3, 4)) and torch.equal(weight.grad, torch.ones(3, 4))
    assert torch.equal(moments["state"][weight]["exp_avg"], torch.full((3, 4), 2.0))
    flat[0] = 5.0
    assert weight[0, 0] == 5.0, "a view goes on being one"


class Host:
    """In place of `torch.UntypedStorage`: memory of the host that has no room after so many allocations."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.made = torch.UntypedStorage

    def __call__(self, nbytes: int) -> torch.UntypedStorage:
        if self.room == 0:
            raise RuntimeError("no memory left on the host")
        self.room -= 1
        return self.made(nbytes)


def test_tensors_that_the_host_has_no_room_for_are_all_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.full((8,), float(number)) for number in range(4)]
    host = Host(room=2)
    monkeypatch.setattr(torch, "UntypedStorage", host)
    with pytest.raises(RuntimeError, match="no memory left on the host"):
        Parked(CPU, weights)
    assert host.room == 0, "some were copied before"
    assert [weight.tolist() for weight in weights] == [[float(number)] * 8 for number in range(4)]


def test_tensors_of_another_kind_of_device_are_left_alone() -> None:
    assert Parked(torch.device("cuda"), [torch.ones(3)]).nbytes == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trainer_holds_weights_masters_and_moments_where_sleep_finds_them(tmp_path: Path, dtype: str) -> None:
    model = ModelSpec(str(tiny_model_folder(tmp_path, hidden=32)), dtype=dtype)
    backend = build_backend(model, BackendSpec("single", OPTIM), Placement())
    tokens = torch.arange(2, 30)
    logps = backend.model(tokens, (28,), torch.arange(1, 28))["main"]
    backend.backward(-logps.sum(), last=True)
    backend.step()
    numel = sum(parameter.numel() for parameter in backend.model.parameters())
    per_weight = sum(tensor.nbytes for tensor in tensors_below(*backend.held)) / numel
    expected = 4 + 8 if dtype == "float32" else 2 + 4 + 8
    assert per_weight == pytest.approx(expected, rel=0.05), "and buffers, which are small"


def test_a_role_computes_on_a_gpu_only_if_it_was_given_one() -> None:
    assert device_of(0, available=True) == CPU
    assert device_of(0, available=False) == CPU
    assert device_of(0.5, available=True) == torch.device("cuda")
    with pytest.raises(ConfigError, match=r"gpus=1, and torch sees no GPU.*gpus=0"):
        device_of(1, available=False)


def test_a_sleeping_role_refuses_everything_until_it_is_woken(tmp_path: Path) -> None:
    folder = str(tiny_model_folder(tmp_path, hidden=32))
    role = ModelWorker("policy", ModelSpec(folder), BackendSpec("single", OPTIM), threads=1)
    role.ready()
    role.sleep()
    with pytest.raises(RunError, match=r"policy sleeps.*`wake` comes before `save_model`"):
        role.save_model(str(tmp_path / "saved"))
    role.wake()
    role.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").exists()


def test_who_is_awake_may_be_woken_and_who_sleeps_put_to_sleep(tmp_path: Path) -> None:
    """Where one rank of a role fails to fall asleep, the next order goes to all of them."""
    folder = str(tiny_model_folder(tmp_path, hidden=32))
    role = ModelWorker("policy", ModelSpec(folder), BackendSpec("single", OPTIM), threads=1)
    role.ready()
    role.wake()
    role.save_model(str(tmp_path / "before"))
    role.sleep()
    role.sleep()
    role.wake()
    role.save_model(str(tmp_path / "after"))
    before, after = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("before", "after"))
    assert before == after and len(before) > 1000
