"""Checkpoints are whole or absent: what commits, what is passed over, what is kept, and what a failure leaves."""

from __future__ import annotations

import asyncio
import json
import os
import warnings
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from actors.errors import ConfigError, DiskError, RunError
from actors.saved_state import Seal, sealed
from orchestrator.checkpoint import MANIFEST, STATE, CheckpointStore, RunState, verify


def state(step: int) -> RunState:
    cursor = {"epoch": 0, "position": 8 * step}
    return RunState("grpo", 1, step, step, step, cursor, {"seed": 7}, "xxh", {"before": 0.25})


async def write(store: CheckpointStore, step: int, content: bytes = b"weights") -> Path:
    async def writer(folder: Path) -> dict[str, Seal]:
        (folder / "policy").mkdir()
        (folder / "policy" / "rank0.pt").write_bytes(content * step)
        return {}

    return (await store.write(writer, state(step))).path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


async def test_the_newest_checkpoint_is_loaded_with_its_state_and_files(tmp_path: Path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.latest() is None
    for step in (1, 2, 3):
        await write(store, step)
    found = CheckpointStore(tmp_path / "checkpoints", keep=2).latest()
    assert found is not None and found.state == state(3)
    assert (found.path / "policy" / "rank0.pt").read_bytes() == b"weights" * 3


async def test_a_file_is_in_the_manifest_as_its_writer_sealed_it_and_a_change_since_then_damages_the_checkpoint(
    tmp_path: Path,
):
    async def writer(folder: Path) -> dict[str, Seal]:
        for name in ("kept", "changed"):
            (folder / name).write_bytes(b"weights")
        seals = {name: sealed(folder / name) for name in ("kept", "changed")}
        (folder / "changed").write_bytes(b"WEIGHTS")
        return seals

    path = (await CheckpointStore(tmp_path, keep=1).write(writer, state(1))).path
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["kept"] == manifest["changed"] == {"bytes": 7, "sha256": sha256(b"weights").hexdigest()}
    assert (problem := verify(path)) and "changed is not what the manifest says" in problem


async def test_a_file_that_the_driver_does_not_see_makes_no_checkpoint(tmp_path: Path):
    async def writer(folder: Path) -> dict[str, Seal]:
        return {"policy/rank1.pt": Seal(bytes=3, sha256="")}  # on a disk of another machine

    with pytest.raises(DiskError, match=r"policy/rank1.pt, 3 bytes by its writer, is not there for the driver"):
        await CheckpointStore(tmp_path, keep=1).write(writer, state(1))
    assert names(tmp_path) == []


async def test_only_the_newest_are_kept(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (2, 4, 6, 8):
        await write(store, step)
    assert names(tmp_path) == ["step-00000006", "step-00000008"]


async def test_the_manifest_lists_every_file_with_size_and_hash(tmp_path: Path):
    path = await write(CheckpointStore(tmp_path, keep=1), 2)
    manifest = json.loads((path / MANIFEST).read_text())
    assert set(manifest) == {"policy/rank0.pt", STATE}
    assert manifest["policy/rank0.pt"]["bytes"] == 14 and len(manifest["policy/rank0.pt"]["sha256"]) == 64


def cut(path: Path) -> None:
    file = path / "policy" / "rank0.pt"
    file.write_bytes(file.read_bytes()[:-1])


def point_outside(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["../elsewhere"] = manifest["policy/rank0.pt"]
    (path / MANIFEST).write_text(json.dumps(manifest))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda path: flip(path / "policy" / "rank0.pt"),
    "a flipped bit in the state": lambda path: flip(path / STATE),
    "a cut-off file": cut,
    "a missing file": lambda path: (path / "policy" / "rank0.pt").unlink(),
    "no manifest": lambda path: (path / MANIFEST).unlink(),
    "a manifest that is no JSON": lambda path: (path / MANIFEST).write_text("{"),
    "a manifest that is a list": lambda path: (path / MANIFEST).write_text("[]"),
    "an empty manifest": lambda path: (path / MANIFEST).write_text("{}"),
    "a file outside of the folder": point_outside,
    "a file that the manifest does not name": lambda path: (path / "policy" / "rank1.pt").write_bytes(b"x"),
    "a link that the manifest does not name": lambda path: (path / "reference").symlink_to(path / "policy"),
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_damaged_checkpoint_is_skipped_with_a_warning_and_the_previous_one_is_used(tmp_path: Path, damage: str):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2):
        await write(store, step)
    DAMAGE[damage](tmp_path / "step-00000002")
    assert verify(tmp_path / "step-00000002")
    with pytest.warns(UserWarning, match="passed over.*step-00000002"):
        found = store.latest()
    assert found is not None and found.state.step == 1


@pytest.mark.parametrize("folder", ["model", "bema"])
async def test_an_unknown_file_beside_a_model_is_a_warning_and_the_checkpoint_is_still_used(
    tmp_path: Path, folder: str
):
    store = CheckpointStore(tmp_path, keep=2)
    path = await write(store, 1)
    (path / folder).mkdir()
    (path / folder / "modeling_evil.py").write_text("")
    with pytest.warns(UserWarning, match=f"the run did not write: {folder}/modeling_evil.py"):
        found = store.latest()
    assert found is not None and found.state.step == 1


async def test_later_checkpoints_than_the_chosen_one_are_removed_when_they_are_given_up(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=5)
    for step in (2, 4, 6, 8):
        await write(store, step)
    found = store.at(4)
    assert found.state == state(4) and found.path.name == "step-00000004"
    assert names(tmp_path)[1:] == ["step-00000004", "step-00000006", "step-00000008"], "choosing alone takes none away"
    store.give_up_after(found)
    assert names(tmp_path) == ["step-00000002", "step-00000004"]
    assert store.latest() == found
    await write(store, 5)
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]


async def test_a_checkpoint_that_is_given_up_has_lost_its_name_on_the_disk_before_it_loses_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = CheckpointStore(tmp_path, keep=5)
    for step in (2, 4, 6):
        await write(store, step)
    calls: list[tuple[str, int, int]] = []  # what is done, the checkpoints and files that there are before

    def counted() -> tuple[int, int]:
        return len(list(tmp_path.glob("step-*"))), sum(file.is_file() for file in tmp_path.rglob("*"))

    files = counted()[1]
    monkeypatch.setattr("orchestrator.checkpoint.sync", lambda path: calls.append(("sync", *counted())))
    monkeypatch.setattr("shutil.rmtree", lambda path, **_: calls.append(("rmtree", *counted())))
    store.give_up_after(store.at(2))
    assert calls == [("sync", 1, files), ("rmtree", 1, files), ("rmtree", 1, files)]
    monkeypatch.undo()
    assert len(names(tmp_path)) == 3, "as if it had been killed here"
    await write(store, 3)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


async def test_a_step_without_a_usable_checkpoint_is_refused_with_those_that_there_are(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=5)
    with pytest.raises(ConfigError, match="no checkpoint of step 3; there are: none"):
        store.at(3)
    for step in (2, 4):
        await write(store, step)
    with pytest.raises(ConfigError, match="no checkpoint of step 3; there are: 2, 4"):
        store.at(3)
    flip(tmp_path / "step-00000004" / STATE)
    with pytest.raises(ConfigError, match=r"step 4 cannot be used: .*state.json is not what the manifest says"):
        store.at(4)


async def test_a_skipped_checkpoint_does_not_count_as_kept_and_is_not_used_again(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=1)
    await write(store, 8)
    newer = await write(CheckpointStore(tmp_path, keep=5), 10)
    flip(newer / STATE)
    await write(store, 9)  # the run was resumed from step 8
    with warnings.catch_warnings(action="error"):
        found = store.latest()
    assert found is not None and found.state.step == 9
    assert names(tmp_path) == ["step-00000009"]


async def test_a_step_that_is_written_again_replaces_the_damaged_one(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=2)
    flip(await write(store, 3) / STATE)
    await write(store, 3, b"again")
    found = store.latest()
    assert found is not None and (found.path / "policy" / "rank0.pt").read_bytes() == b"again" * 3


async def test_a_failed_write_leaves_no_folder_and_keeps_the_previous_checkpoint(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=1)
    await write(store, 1)

    async def fails(folder: Path) -> dict[str, Seal]:
        (folder / "half").write_bytes(b"x")
        raise ValueError("a rank died")

    with pytest.raises(ValueError, match="a rank died"):
        await store.write(fails, state(2))
    assert names(tmp_path) == ["step-00000001"]


async def test_a_disk_error_is_reported_with_a_remedy(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=1)

    async def full(folder: Path) -> dict[str, Seal]:
        with open("/dev/full", "wb", buffering=0) as stream:
            stream.write(b"x")
        return {}

    with pytest.raises(DiskError, match=r"step 2 could not be written.*No space left.*make room"):
        await store.write(full, state(2))
    assert names(tmp_path) == []


async def test_leftovers_of_a_killed_process_are_removed_by_the_next_write(tmp_path: Path):
    left = tmp_path / ".tmp-7-deadbeef"
    left.mkdir()
    (left / "rank0.pt").write_bytes(b"x")
    store = CheckpointStore(tmp_path, keep=1)
    assert store.latest() is None
    await write(store, 8)
    assert names(tmp_path) == ["step-00000008"]


async def test_a_cancelled_write_leaves_a_complete_checkpoint_or_none(tmp_path: Path):
    """Cancelled at every point of its course, the commit in its thread among them."""
    store = CheckpointStore(tmp_path, keep=1)
    outcomes = set()
    for step in range(1, 60):
        task = asyncio.ensure_future(write(store, step, os.urandom(20_000)))
        for _ in range(step % 6):
            await asyncio.sleep(0.0005)
        task.cancel()
        await asyncio.wait({task})
        await asyncio.sleep(0.002)
        with warnings.catch_warnings(action="error"):  # nothing that was committed is damaged
            found = store.latest()
        assert not list(tmp_path.glob(".tmp-*"))
        outcomes.add(found is not None and found.state.step == step)
    assert outcomes == {True, False}, "both kinds of outcome were seen"


async def test_a_state_of_another_version_is_an_error_that_says_so(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=1)
    path = await write(store, 1)
    content = json.dumps(json.loads((path / STATE).read_text()) | {"new_field": 1}).encode()
    (path / STATE).write_bytes(content)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest[STATE] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=r"not of this version.*new_field"):
        store.latest()
