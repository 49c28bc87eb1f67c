"""The cases of `losses.json`: what another implementation computed on fixed inputs (its `source`).

The inputs are padded; here every padded row becomes a ragged row of the same width whose mask leaves the padding out,
after one token that nothing predicts. Which method and options a case is in ours is said by `peer.py`. Cases in which
we differ on purpose are in `DEPARTURES`, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.objective import MicroBatch
from orchestrator.losses.objective import LossObjective
from tests.golden.peer import NOT_COMPARABLE, ours
from tests.unit.loss_rows import objective_of
from tests.unit.trainer_stub import Result, Rows

FILE = json.loads((Path(__file__).parent / "losses.json").read_text())
CASES: dict[str, dict[str, Any]] = {case["id"]: case for case in FILE["cases"]}

DEPARTURES = {
    "dpo/sigmoid_ls0.1_IGNORED": "the peer ignores label smoothing here; ours applies it",
    "gfpo/group_slicing_note": "the peer filters overlapping slices of the batch; ours a prompt's own samples",
}
_COMPARED: set[str] = set()  # cases that a test of this folder computes, of the files imported so far


def the(name: str) -> dict[str, Any]:
    """A case that a test compares."""
    _COMPARED.add(name)
    return CASES[name]


def cases(*prefixes: str, without: tuple[str, ...] = ()) -> Any:
    left_out = {*DEPARTURES, *NOT_COMPARABLE, *without}
    names = [name for name in CASES if name.startswith(prefixes) and not name.startswith(tuple(left_out))]
    return pytest.mark.parametrize("case", [the(name) for name in names], ids=names)


def compared() -> set[str]:
    """The cases that some test of this folder computes. Each file adds its own when it is imported."""
    for file in sorted(Path(__file__).parent.glob("test_*.py")):
        import_module(f"tests.golden.{file.stem}")
    return _COMPARED


def padded(values: Sequence[Sequence[float]]) -> Tensor:
    """[R, C] -> flat [R * (C + 1)], a zero before each row."""
    matrix = torch.tensor(values, dtype=torch.float64)
    return torch.cat([torch.zeros(len(matrix), 1, dtype=torch.float64), matrix], dim=1).flatten()


def unpadded(flat: Tensor, rows: int) -> Tensor:
    return flat.view(rows, -1)[:, 1:]


def rows_of(
    logps: list[list[float]], mask: list[list[int]], extra: dict[str, Any] | None = None, **columns: Tensor
) -> Rows:
    """Ragged rows of one width; extras are padded like the log-probabilities."""
    lengths = torch.full((len(logps),), len(logps[0]) + 1)
    columns = {"mask": padded(mask).bool(), **columns}
    found = {name: padded(values) for name, values in (extra or {}).items()}
    return Rows(MicroBatch(lengths, columns), padded(logps), found)


def assert_equal(result: Result, case: dict[str, Any], gradient: str, mask: list[list[int]]) -> None:
    """Value and gradient, the latter where the mask is 1: elsewhere the peer's inputs are not differentiable at all."""
    assert result.value == pytest.approx(case["outputs"]["loss"], abs=1e-6)
    expected = torch.tensor(case["outputs"][gradient]) * torch.tensor(mask)
    torch.testing.assert_close(unpadded(result.gradient, len(mask)), expected.double(), atol=1e-6, rtol=1e-6)


def objective_for(case: dict[str, Any]) -> LossObjective:
    return objective_of(*ours(case))
