"""All trackers by name, and what each needs to be installed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec

from actors.errors import ConfigError
from orchestrator.config.schema import TrackerName
from orchestrator.reporting.trackers import libraries
from orchestrator.reporting.trackers.queued import QueuedTracker
from orchestrator.reporting.trackers.tracker import TrackedRun, Tracker


@dataclass(frozen=True)
class Library:
    """`module`: what is imported. `needs`: what `pip install` is given where it is missing."""

    title: str
    module: str
    needs: str
    tracker: Callable[[TrackedRun], Tracker]


TRACKERS: dict[TrackerName, Library] = {
    "tensorboard": Library("TensorBoard", "tensorboard", "tensorboard", libraries.TensorBoardFiles),
    "wandb": Library("Weights & Biases", "wandb", "troupe[wandb]", libraries.WeightsAndBiases),
    "mlflow": Library("MLflow", "mlflow", "troupe[mlflow]", libraries.MLflow),
    "trackio": Library("Trackio", "trackio", "troupe[trackio]", libraries.Trackio),
}


def refuse_missing(names: Iterable[TrackerName]) -> None:
    """Raises ConfigError for trackers whose libraries this Python does not have."""
    missing = [TRACKERS[name] for name in names if find_spec(TRACKERS[name].module) is None]
    if missing:
        wanted = " ".join(f'"{library.needs}"' for library in missing)
        raise ConfigError(
            f"logging.trackers: {', '.join(library.title for library in missing)} is not installed here; "
            f"`pip install {wanted}`, or leave it out"
        )


def queued(name: TrackerName, run: TrackedRun, tell: Callable[[str], None]) -> QueuedTracker:
    """The tracker of that name, started or continued for this run in a thread of its own."""
    return QueuedTracker(name, lambda: TRACKERS[name].tracker(run), tell)
