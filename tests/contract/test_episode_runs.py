"""Whole runs of episodes in this process, with the hf engine. With vLLM and Ray: `tests/ray/test_online_methods.py`."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from actors.batch import Batch
from actors.model import ModelSpec
from actors.model_worker import ModelWorker
from actors.sharding import shard
from actors.specs import BackendSpec
from actors.worker import LocalWorker
from orchestrator.cluster.launch import optim_spec
from orchestrator.collection.episodes import rewards_of
from orchestrator.config.loading import config_of
from orchestrator.config.schema import RunConfig
from orchestrator.credit.advantages import zscore_by_group
from orchestrator.losses.objective import LossObjective
from orchestrator.planning.resolve import prepare
from orchestrator.reporting import token_tables
from orchestrator.reporting.metrics import METRICS_FILE, read
from orchestrator.run import run
from rewards.environment_worker import EnvironmentWorker
from rollout.conversation import ConversationSpec
from rollout.engine import EngineSpec
from rollout.episode import EpisodeRequest
from rollout.sampling import GroupMeta, sample_seed
from rollout.worker import RolloutWorker
from tests.online_phases import EPISODES, assert_three_steps_of_each, recipe

pytestmark = pytest.mark.timeout(600)
STEPS, PROMPTS, SAMPLES = 3, 4, 4


def test_methods_of_every_kind_take_three_steps_on_episodes(tmp_path: Path) -> None:
    """Ratios are 1 and divergences 0 at the first step, over rows with holes in their masks."""
    result = run(config_of(recipe(tmp_path, {"engine": "hf"}, EPISODES), [], "test"), local=True)
    assert_three_steps_of_each(result.folder, tolerance=1e-5, phases=EPISODES)


REWRITING = """{% for m in messages %}
{{ m.role }}: {{ m.content if m.role == 'user' else 'something' }}<eos>
{% endfor %}
{% if add_generation_prompt %}assistant: {% endif %}"""


def test_with_a_row_for_each_turn_the_template_may_rewrite_history(tmp_path: Path) -> None:
    """Ratios are 1 at the first step: each row is what the model was shown for that turn."""
    chosen = {name: EPISODES[f"{name}_episodes"] for name in ("grpo", "reinforce_pp")}
    tree = recipe(tmp_path, {"engine": "hf"}, chosen)
    (tmp_path / "template.jinja").write_text(REWRITING)
    for phase in tree["phases"].values():
        phase["episode"] = {**phase["episode"], "split": "turns"}
        phase["train"] = {**phase["train"], "batch_size": 2}
    tree["logging"]["completions_every"] = 1
    folder = run(config_of(tree, [], "test"), local=True).folder
    assert_three_steps_of_each(folder, tolerance=1e-5, phases=chosen)
    files = sorted((folder / "completions").glob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert len(rows) == 2 * STEPS * 2 * SAMPLES, "the table shows episodes, not turns"
    assert all(row["turns"] == 2 for row in rows)
    for step in range(1, 2 * STEPS + 1):
        kept = token_tables.read(folder / "tokens", step, range(2 * SAMPLES))
        turns = {line: [len(turn["pieces"]) for turn in rows] for line, rows in kept.items()}
        assert [len(turns[line]) for line in range(2 * SAMPLES)] == [2] * 2 * SAMPLES, "the tokens are those of turns"


def configured(where: Path, **evaluation: Any) -> RunConfig:
    tree = recipe(where, {"engine": "hf"}, {"grpo_episodes": EPISODES["grpo_episodes"]}, rewards=[])
    phase = tree["phases"]["grpo_episodes"]
    phase |= {"options": {"num_generations": SAMPLES}, **evaluation}
    tree |= {"phases": {"a": phase}, "checkpoint": {"every": 1, "keep": 9}}
    tree["logging"]["completions_every"] = 1
    return RunConfig.model_validate(tree)


def naive_loop(config: RunConfig, to: Path) -> None:
    """Play the episodes of a step, compare their rewards, step, and give the engine the weights: one after the
    other."""
    (prepared,) = prepare(config).phases
    (stage,), settings, train = prepared.pipeline.updates, prepared.episode, prepared.config.train
    assert settings is not None
    objective = LossObjective.of(stage)
    optim = optim_spec(prepared, "policy", config.roles.policy)
    policy = ModelWorker(
        "policy", ModelSpec(config.model.path), BackendSpec("single", optim), threads=torch.get_num_threads()
    )
    policy.ready()
    spec = EngineSpec("hf", config.model.path, max_model_len=500)
    assert config.model.chat_template is not None
    template = Path(config.model.chat_template).read_text()
    rollout = RolloutWorker("rollout", spec, 0, conversation=ConversationSpec(config.model.path, template))
    host = LocalWorker("environment", EnvironmentWorker("e", {"a": settings.spec}, {"a": 1000}))

    async def play(position: int, index: int) -> Batch:
        _, item = prepared.source.order.at(position)
        prompt: Any = prepared.source.item(item)
        seed = sample_seed(sample_seed(config.seed, position), index)
        request = EpisodeRequest(
            f"{position}#{index}", "a", prompt.prompt, prompt.columns, prepared.sampling, seed, settings.limits,
            group=position,
        )  # fmt: skip
        meta, row, _ = await rollout.episode(request, host)
        assert isinstance(meta, GroupMeta)
        return row.with_columns(reward=rewards_of(meta.episodes))

    async def load(weights: list[tuple[str, torch.Tensor]], version: int) -> None:
        await asyncio.wrap_future(rollout._loop.load(lambda engine: engine.load(weights, version) or ""))

    async def loop() -> None:
        await rollout.ready()
        await host.call("ready", timeout_s=200.0)
        for step in range(STEPS):
            positions = range(step * PROMPTS, (step + 1) * PROMPTS)
            rows = [await play(position, index) for position in positions for index in range(SAMPLES)]
            batch = Batch.concat(rows)
            advantages = zscore_by_group(batch["reward"], batch["group"])
            batch = batch.with_columns(advantages=np.repeat(advantages, batch.lengths))
            needed = batch.only({"tokens", "mask", "group"} | objective.columns)
            ((_, part),) = shard(needed, 1, train.micro_batch_tokens, keep_groups=objective.keep_groups)
            policy.update(part, objective, prepared.temperature, stage.name)
            named = [(n.removeprefix("causal."), v.detach()) for n, v in policy.backend.model.named_parameters()]
            await load(named, step + 1)

    try:
        asyncio.run(loop())
    finally:
        rollout.close()
    policy.save_model(str(to))


def test_with_no_staleness_the_updates_equal_those_of_a_naive_loop_bit_for_bit(tmp_path: Path) -> None:
    config = configured(tmp_path)
    result = run(config, local=True)
    naive_loop(config, tmp_path / "naive")
    assert result.checkpoint is not None
    found, expected, began = (
        load_file(folder / "model.safetensors")
        for folder in (result.checkpoint / "model", tmp_path / "naive", Path(config.model.path))
    )
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert not all(torch.equal(found[name], began[name]) for name in expected)


def test_tables_and_evaluation_show_the_turns(tmp_path: Path) -> None:
    held_out = {"data": {"path": str(tmp_path / "prompts.jsonl"), "limit": 2}}
    config = configured(tmp_path, evaluation=held_out)
    logging = config.logging.model_copy(update={"token_samples": 2 * SAMPLES + 1, "token_steps": 2})
    config = config.model_copy(update={"logging": logging})
    folder = run(config, local=True).folder
    (first, *_) = [line for line in read(folder / METRICS_FILE) if "eval_reward" in line]
    assert first["eval_episodes/mean_turns"] == 2 and first["eval_rewards/environment/mean"] == first["eval_reward"]
    row, *_ = pq.read_table(folder / "completions" / "step_000001.parquet").to_pylist()
    messages = json.loads(row["messages"])
    assert [said["role"] for said in messages] == ["assistant", "user", "assistant", "user"]
    said = "\n".join(f"{each['role']}: {each['content']}" for each in messages)
    assert (row["turns"], row["tool_calls"], row["completion"]) == (2, 0, said)

    steps = [token_tables.step_of(file) for file in token_tables.of_steps(folder / "tokens")]
    assert steps == [STEPS - 1, STEPS], "of the newest steps, as logging.token_steps says"
    rows = pq.read_table(folder / "completions" / f"step_{STEPS:06d}.parquet").to_pylist()
    kept = token_tables.read(folder / "tokens", STEPS, range(len(rows)))
    assert sorted(kept) == list(range(2 * SAMPLES)), "of whole prompt groups, as logging.token_samples says"
    for line, (tokens,) in kept.items():
        assert_tokens_of(rows[line], tokens)
    rewards = np.array([row["reward"] for row in rows[: 2 * SAMPLES]])
    groups = np.array([row["position"] for row in rows[: 2 * SAMPLES]])
    found = [next(filter(None, kept[line][0]["values"]["advantages"])) for line in range(2 * SAMPLES)]
    np.testing.assert_allclose(found, zscore_by_group(rewards, groups), rtol=1e-3)


def assert_tokens_of(row: dict[str, Any], tokens: dict[str, Any]) -> None:
    """They are those of the episode in this row of the table of completions."""
    assert (tokens["start"], tokens["total"]) == (0, len(tokens["pieces"]))
    turns = "".join(piece if mine else "\0" for piece, mine in zip(tokens["pieces"], tokens["mask"], strict=True))
    wrote = [re.sub(r"<\w+>", "", turn) for turn in re.split("\0+", turns) if turn]  # without special tokens
    messages = json.loads(row["messages"])
    assert wrote == [each["content"] for each in messages if each["role"] == "assistant"], (
        "what it did not write is masked"
    )
    assert "user: more" in "".join(tokens["pieces"])
    for name in ("sample_logps", "advantages"):
        assert [value is not None for value in tokens["values"][name]] == tokens["mask"], name
    assert max(filter(None, tokens["values"]["sample_logps"])) < 0
