"""An engine without a model that judges by the rule of `judge_server`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from actors.pretrained import load_tokenizer
from rollout.engine import EngineSpec
from rollout.sampling import Request
from rollout.scripted_engine import ScriptedEngine
from tests.judge_server import judgement


class RuleEngine(ScriptedEngine):
    """`options.model` is the name of the rule's model."""

    def __init__(self, spec: EngineSpec) -> None:
        tokenizer = load_tokenizer(spec.model, False)
        model = str(spec.options["model"])

        def answer(request: Request, index: int) -> Sequence[int]:
            question = tokenizer.decode(list(request.prompt), skip_special_tokens=True)
            said = judgement(question, model)
            return [*tokenizer(said, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

        super().__init__(replace(spec, options={"completions": answer, "eos": tokenizer.eos_token_id}))
