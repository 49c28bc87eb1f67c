"""The classes of the installed Ray take what the Train tab is given, and its dashboard can show it."""

from __future__ import annotations

import pickle
from typing import Any

from orchestrator.cluster.train_tab import Facts, Rank, records


def test_a_record_of_a_run_with_its_ranks_is_one_that_rays_dashboard_shows():
    from ray.train.v2._internal.state import schema

    ranks = [Rank(f"actor{index}", f"node{index // 2}", "10.0.0.1", 100 + index, 1.0, 0.5) for index in range(3)]
    facts = Facts("math-1", "01000000", ranks, {"phases.grpo.train.steps": 3, "rewards": [], "debug": None}, "/runs")
    found: tuple[Any, Any] = pickle.loads(pickle.dumps(records(schema, facts)))  # it goes to an actor
    run, attempt = found
    shown = schema.DecoratedTrainRun.model_validate(
        {**run.model_dump(), "attempts": [attempt.model_dump()], "job_details": None}
    )
    assert (shown.name, shown.status, shown.job_id) == ("math-1", schema.RunStatus.RUNNING, "01000000")
    assert shown.run_settings.train_loop_config == {"phases.grpo.train.steps": 3, "rewards": [], "debug": None}
    workers = shown.attempts[0].workers
    assert [worker.actor_id for worker in workers] == ["actor0", "actor1", "actor2"]
    assert [(worker.node_rank, worker.local_rank) for worker in workers] == [(0, 0), (0, 1), (1, 0)]
    assert shown.controller_actor_id == "actor0" and shown.run_settings.scaling_config.num_workers == 3
    for state in ("FINISHED", "ERRORED", "ABORTED"):
        assert schema.RunStatus[state].is_terminal() and schema.RunAttemptStatus[state].is_terminal()
