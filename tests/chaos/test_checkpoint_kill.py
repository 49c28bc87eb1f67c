"""Checkpoints under `kill -9`, a full disk and flipped bits: one is always valid, and it never goes backwards."""

from __future__ import annotations

import asyncio
import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.checkpoint_parts import Part
from actors.saved_state import Seal
from orchestrator.checkpoint import Checkpoint, CheckpointStore, RunState
from tests.unit.model_worker_stage import assert_equal_bits, differing, train, trainable
from tests.unit.tiny import tiny_model_folder

KILLS = 25
KEEP = 2
WRITER = """
import asyncio, os, resource, signal, sys
from pathlib import Path
from orchestrator.checkpoint import CheckpointStore, RunState

folder, keep, largest, library = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if largest:  # bytes that the disk takes
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

async def plainly(path):
    for rank in range(3):
        (path / f"rank{rank}.pt").write_bytes(os.urandom(150_000))
    return {}

async def with_torch(path):
    import torch
    from actors import saved_state
    saved_state.save({"weights": torch.randn(40_000)}, path / "rank0.pt")
    return {}

async def with_transformers(path):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from actors import saved_state
    config = Qwen2Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=512)
    with saved_state.writing(path):
        Qwen2ForCausalLM(config).save_pretrained(path / "model")
    return {}

fill = {"plainly": plainly, "torch": with_torch, "transformers": with_transformers}[library]

async def main():
    store = CheckpointStore(folder, keep=keep)
    found = store.latest()
    step = found.state.total_step if found else 0
    while True:
        step += 1
        await store.write(fill, RunState("p", 0, step, step, step, {}, {}, ""))
        print(step, flush=True)

asyncio.run(main())
"""


class Writer:
    """A process that goes on from the newest checkpoint and writes one after the other, as fast as it can."""

    def __init__(self, folder: Path, largest_file: int = 0, library: str = "plainly") -> None:
        arguments = [sys.executable, "-c", WRITER, str(folder), str(KEEP), str(largest_file), library]
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def kill_after(self, seconds: float, steps: int = 1) -> list[int]:
        """The steps that it said were written when it was killed, `seconds` after it had written that many."""
        assert self.process.stdout is not None
        first = ""
        for _ in range(steps):
            line = self.process.stdout.readline()
            assert line, self.process.communicate()[1]
            first += line
        time.sleep(seconds)
        self.process.send_signal(signal.SIGKILL)
        with self.process:  # closes the pipes
            rest = self.process.stdout.read()  # `communicate` would miss the lines that came with the first one
        return [int(line) for line in (first + rest).splitlines()]


def newest(folder: Path) -> Checkpoint:
    found = CheckpointStore(folder, keep=KEEP).latest()
    assert found is not None
    return found


def flip_a_bit(path: Path, chance: random.Random) -> None:
    file = chance.choice([file for file in path.iterdir() if file.stat().st_size])
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


@pytest.mark.filterwarnings("error")  # nothing that a kill leaves behind is ever taken for a checkpoint
def test_the_newest_checkpoint_stays_valid_and_its_step_never_decreases_through_many_kills(tmp_path: Path):
    chance, last = random.Random(0), 0
    for kill in range(KILLS):
        said = Writer(tmp_path).kill_after(chance.uniform(0, 0.05), steps=1 + kill % 2)
        assert said[0] == last + 1, "it went on from the newest"
        last = newest(tmp_path).state.total_step
        assert last in (said[-1], said[-1] + 1), "what was said to be written is there"
    assert last > KILLS


def test_a_checkpoint_with_a_flipped_bit_is_skipped_and_the_run_continues_from_the_previous_one(tmp_path: Path):
    chance = random.Random(1)
    for _ in range(5):
        said = Writer(tmp_path).kill_after(0.05, steps=2)
        before = newest(tmp_path)
        assert before.state.total_step >= said[-1] >= 2
        flip_a_bit(before.path, chance)
        with pytest.warns(UserWarning, match=f"passed over.*{before.path.name}"):
            assert newest(tmp_path).state.total_step == before.state.total_step - 1
        again = Writer(tmp_path).kill_after(0.01)
        assert again[0] == before.state.total_step
        assert newest(tmp_path).state.total_step >= before.state.total_step


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("largest_file", [1, 50, 100_000])
@pytest.mark.parametrize("library", ["plainly", "torch", "transformers"])
def test_a_full_disk_ends_the_writer_with_a_message_and_the_previous_checkpoint_is_intact(
    tmp_path: Path, largest_file: int, library: str
):
    """torch, safetensors and Python each fail in a way of their own: what is raised is the same."""
    Writer(tmp_path).kill_after(0.02)
    before = newest(tmp_path)
    writer = Writer(tmp_path, largest_file, library)
    _, complaint = writer.process.communicate(timeout=120)
    assert writer.process.returncode == 1
    last = complaint.splitlines()[-1]
    assert last.startswith("actors.errors.DiskError: the checkpoint of step") and "make room" in last, complaint
    assert {"plainly": os.strerror(errno.EFBIG), "torch": "inline_container"}.get(library, "MiB free there") in last
    assert newest(tmp_path).state == before.state
    assert not list(tmp_path.glob(".tmp-*"))


def dies_at(point: int, folder: Path) -> None:
    """This process is killed when it touches the folder for the `point`th time: makes, opens, renames or removes."""
    seen = 0

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("os.mkdir", "open", "os.rename", "os.remove", "os.rmdir") and str(folder) in str(arguments[0]):
            seen += 1
            if seen == point:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def saves_while_it_trains(model: Path, folder: Path, steps: int) -> None:
    """Goes on from the newest checkpoint to `steps`; every step is saved while the next ones are done."""
    worker, store = trainable(model), CheckpointStore(folder, keep=KEEP)

    async def fill(path: Path) -> dict[str, Seal]:
        await asyncio.to_thread((path / "policy").mkdir)
        worker.begin_save(str(path), [Part("state", "policy"), Part("model", "model")])
        begun.set()
        return await asyncio.to_thread(worker.finish_save, 60.0)

    async def run() -> None:
        found = store.latest()
        if found is not None:
            worker.load_state(str(found.path / "policy"))
        for step in range(found.state.total_step if found else 0, steps):
            await asyncio.to_thread(train, worker, range(step, step + 1))
            if saving:
                await saving.pop()
            begun.clear()
            state = RunState("p", 0, step + 1, step + 1, step + 1, {}, {}, "")
            saving.append(asyncio.ensure_future(store.write(fill, state)))
            await begun.wait()
        await saving.pop()

    begun, saving = asyncio.Event(), list[asyncio.Future[Checkpoint]]()
    asyncio.run(run())


@pytest.mark.filterwarnings("error")
def test_a_run_killed_anywhere_in_a_save_beside_its_training_resumes_with_the_weights_of_a_saved_step(tmp_path: Path):
    """Killed in turn at the first, sixth, eleventh ... touch of the checkpoints, until a run gets to its end."""
    torch.set_num_threads(1)  # what is forked has no threads of OpenMP
    model, folder, steps = tiny_model_folder(tmp_path), tmp_path / "checkpoints", 3
    straight, expected = trainable(model), list[dict[str, torch.Tensor]]()
    for step in range(steps):
        train(straight, range(step, step + 1))
        expected.append({name: weight.clone() for name, weight in straight.backend.trained_weights()})
    kills, saved = 0, list[int]()
    while True:
        run = multiprocessing.get_context("fork").Process(
            target=_killed_run, args=(2 * kills + 1, model, folder, steps)
        )
        run.start()
        run.join(120)
        found = CheckpointStore(folder, keep=KEEP).latest()
        saved.append(found.state.total_step if found else 0)
        if found is not None:
            resumed = trainable(model)
            resumed.load_state(str(found.path / "policy"))
            assert_equal_bits(dict(resumed.backend.trained_weights()), expected[saved[-1] - 1])
        if run.exitcode == 0:
            break
        assert run.exitcode == -signal.SIGKILL
        kills += 1
    assert saved == sorted(saved) and saved[-1] == steps and {0, 1} <= set(saved)
    assert kills > 4, "a save touches the folder more often than that"
    assert differing(expected[0], expected[-1])


def _killed_run(point: int, model: Path, folder: Path, steps: int) -> None:
    dies_at(point, folder)
    saves_while_it_trains(model, folder, steps)
