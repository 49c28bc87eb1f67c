"""The loss of a reward model and the rows of a process reward model against the numbers of another implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from actors.objective import MicroBatch
from orchestrator.methods import build
from tests.golden.cases import cases, objective_for
from tests.golden.peer import ours
from tests.unit.source_stub import opened, write_rows
from tests.unit.trainer_stub import Rows, optimise


@cases("reward/")
def test_a_reward_models_loss_equals_the_peer(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    scores = torch.tensor([*inputs["rewards_chosen"], *inputs["rewards_rejected"]], dtype=torch.float64)
    pairs = len(scores) // 2
    columns = {
        "mask": torch.tensor([False, True] * 2 * pairs),
        "group": torch.arange(pairs).repeat(2),
        "preferred": torch.arange(2 * pairs) < pairs,
    }
    if inputs["margin"] is not None:
        columns["margin"] = torch.tensor(inputs["margin"], dtype=torch.float64).repeat(2)
    rows = Rows(MicroBatch(torch.full((2 * pairs,), 2), columns), scores, per_row=True)
    result = optimise(objective_for(case), rows)
    assert result.value == pytest.approx(case["outputs"]["loss"], abs=1e-6)
    torch.testing.assert_close(result.gradient, torch.tensor(case["outputs"]["grad"]).double(), atol=1e-6, rtol=1e-6)


def tokenizer_of_the_peer(case: dict[str, Any]) -> PreTrainedTokenizerBase:
    """One token per character, after one that begins a sequence; a space or a line break is none."""
    inputs, ids = case["inputs"], case["outputs"]["input_ids"]
    text = "".join(("".join([inputs["prompt"], *inputs["completions"]])).split())
    vocabulary = {"<unk>": 0, "<bos>": ids[0], **dict(zip(text, ids[1:], strict=True))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Sequence([Whitespace(), Split("", "isolated")])
    words.post_processor = TemplateProcessing("<bos> $A", None, [("<bos>", ids[0])])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>", unk_token="<unk>")


@cases("prm/")
def test_steps_and_their_labels_equal_the_peer(case: dict[str, Any], tmp_path: Path) -> None:
    inputs, (method, options) = case["inputs"], ours(case)
    file = write_rows(tmp_path / "steps.jsonl", [inputs])
    batch = opened(file, build(method, options).data, tokenizer_of_the_peer(case)).item(0).batch
    assert batch["tokens"].tolist() == case["outputs"]["input_ids"]
    assert batch["step_label"].tolist() == [-1 if label == -100 else label for label in case["outputs"]["labels"]]
