"""How long training stands still for a checkpoint, and how much longer the step is during which it is written.

    python tests/benchmarks/checkpoint_pause.py [--size 26m] [--rounds 3] [--rows 16]

One trainer in this process (`single`, float32, AdamW), which saves beside every other step. "call" begins a save in the
background; "wait" is how much longer the optimizer's part of the step takes, which waits until the old weights are
copied; "at once" is a save for which training would wait.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from actors.batch import Batch
from actors.checkpoint_parts import Part
from actors.model import ModelSpec
from actors.model_worker import ModelWorker
from actors.sharding import Shard, shard
from actors.specs import BackendSpec, OptimSpec
from orchestrator.data.synthetic_examples import model_folder
from tests.benchmarks.workload import SEED, SIZES
from tests.masked_nll import MaskedNll

PARTS = [Part("state", "policy"), Part("model", "model")]
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="26m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16, help="of a step's batch, 77 tokens each on average")
    given = parser.parse_args()
    backend = BackendSpec("single", OptimSpec(1e-5, 1000))
    worker = ModelWorker("policy", ModelSpec(str(model_folder(f"skewed-{given.size}", SEED))), backend, threads=1)
    worker.ready()
    batch = _batch(given.rows)
    worker.update(batch, MaskedNll(), 1.0, "u")
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for index in range(given.rounds):
            for name, seconds in _round(worker, batch, Path(folder) / str(index)).items():
                found.setdefault(name, []).append(seconds)
        size = sum(file.stat().st_size for file in (Path(folder) / "0").rglob("*") if file.is_file()) / 2
    median = {name: float(np.median(each)) for name, each in found.items()}
    print(f"{given.size}: a checkpoint of {size / MIB:.0f} MiB; median of {given.rounds}, in ms")
    print("  " + ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in median.items()))
    print(f"  stands still for {(median['call'] + max(0.0, median['wait'])) / median['step']:.1%} of a step")


def _round(worker: ModelWorker, batch: Shard, folder: Path) -> dict[str, float]:
    """Seconds of one step, of one beside which a checkpoint is written, and of the parts of this."""

    def step() -> tuple[float, float]:
        began = time.perf_counter()
        report = worker.update(batch, MaskedNll(), 1.0, "u")
        return time.perf_counter() - began, report.seconds["step"]

    for part in ("beside", "beside/policy", "at_once"):
        (folder / part).mkdir(parents=True)
    plain, optimizer = step()
    began = time.perf_counter()
    worker.begin_save(str(folder / "beside"), PARTS)
    called = time.perf_counter() - began
    during, its_optimizer = step()
    worker.finish_save(600.0)
    written = time.perf_counter() - began

    def save() -> None:
        worker.save_state(str(folder / "at_once"))
        worker.save_model(str(folder / "at_once" / "model"))

    return {
        "step": plain,
        "at once": _seconds(save),
        "call": called,
        "wait": its_optimizer - optimizer,
        "step beside a save": during,
        "until written": written,
    }


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _batch(rows: int) -> Shard:
    random = np.random.default_rng(0)
    lengths = (256 * random.beta(0.9, 2.1, rows)).astype(int) + 2
    tokens = random.integers(2, 60, lengths.sum()).astype(np.int32)
    ((_, batch),) = shard(Batch.build(lengths, tokens=tokens, mask=np.ones(lengths.sum(), bool)), 1, 8192)
    return batch


if __name__ == "__main__":
    main()
