"""A run whose samples are the conversations of a program that speaks the OpenAI protocol, in this process and with the
hf engine."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from orchestrator.config.loading import config_of
from orchestrator.reporting.metrics import METRICS_FILE, read
from orchestrator.run import run

pytest.importorskip("openai")

AGENT = '''
from openai import OpenAI
from rewards.environments.openai_agent import AgentEnvironment

def count_evens(row, base_url, api_key):
    """Two turns; the reward is the share of even characters in what the model said."""
    client = OpenAI(base_url=base_url, api_key=api_key)
    messages = [{"role": "user", "content": row["answer"]}]
    said = ""
    for _ in range(2):
        message = client.chat.completions.create(model="policy", messages=messages).choices[0].message
        said += message.content
        messages += [message, {"role": "user", "content": "more"}]
    return sum(ord(letter) % 2 == 0 for letter in said) / max(1, len(said))

def agent():
    return AgentEnvironment(count_evens)
'''


@pytest.mark.timeout(300)
def test_the_conversations_of_an_agent_are_trained_on(tmp_path: Path) -> None:
    (tmp_path / "agent.py").write_text(AGENT)
    tree = {
        "name": "agents",
        "output": str(tmp_path),
        "model": {"path": "example:calculator"},
        "method": "grpo",
        "options": {"num_generations": 4},
        "data": {"path": "example:calculator", "options": {"rows": 16}},
        "episode": {"environment": f"{tmp_path}/agent.py:agent", "max_turn_tokens": 8, "reward_weight": 2.0},
        "train": {"steps": 2, "batch_size": 4, "learning_rate": 1e-3},
        "sampling": {"max_tokens": 64, "stop_token_ids": list(range(100, 160))},
        "logging": {"trackers": [], "curves": False, "completions_every": 1},
        "roles": {"rollout": {"engine": "hf"}},
    }
    folder = run(config_of(tree, [], "test"), local=True).folder
    steps = [line for line in read(folder / METRICS_FILE) if "loss" in line]
    assert len(steps) == 2 and all(line["reward_std"] > 0 for line in steps)
    assert all(1 < line["episodes/mean_turns"] <= 2 for line in steps)
    files = sorted((folder / "completions").glob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert len(rows) == 2 * 4 * 4
    whole = [row for row in rows if not math.isnan(row["reward"])]  # the agent of one that was cut earns nothing
    assert 4 < len(whole) < len(rows)
    for row in whole:
        messages = row["messages"] if isinstance(row["messages"], list) else json.loads(row["messages"])
        said = "".join(message["content"] for message in messages if message["role"] == "assistant")
        assert [message["role"] for message in messages] == ["assistant", "user", "assistant"]
        assert row["reward"] == pytest.approx(2.0 * sum(ord(letter) % 2 == 0 for letter in said) / max(1, len(said)))
