"""Which engines get the adapters of the role that they follow alone, and which its weights with the adapters merged."""

# pyright: basic
# (model configurations are typed in part only)

from __future__ import annotations

from collections.abc import Iterator

from actors import pretrained
from actors.specs import LoraSpec
from orchestrator.config.roles import AUTO_ENGINE, EngineRole
from orchestrator.planning.prepared import Prepared
from orchestrator.plugins import importable
from rollout import vllm_adapters
from rollout.engine import ENGINES, Ability, abilities_of


def merged_because(prepared: Prepared) -> dict[str, str | None]:
    """Of each engine role that follows a role with adapters: why its weights are published with these merged in; None
    if the adapters are published alone."""
    lora, config = prepared.lora, prepared.config
    trained = {role for phase in prepared.phases for role in phase.pipeline.trained}
    following = {
        role: settings
        for role, settings in config.roles
        if isinstance(settings, EngineRole)
        and settings.follows in trained
        and settings.engine != AUTO_ENGINE  # else nothing launches it (`engine_choice.py`)
    }
    if lora is None:
        return {}
    if config.weights.lora == "merged":
        return dict.fromkeys(following, "weights.lora=merged")
    return {role: next(_obstacles(prepared, role, engine, lora), None) for role, engine in following.items()}


def _obstacles(prepared: Prepared, role: str, engine: EngineRole, lora: LoraSpec) -> Iterator[str]:
    """Why the engine cannot have the adapters beside the model. With both, it must compute what the trainer computes:
    it reads the rest of the model from the same folder, in the same type."""
    model, source = prepared.config.model, prepared.config.roles.ranks(engine.follows)
    path = prepared.models.get(engine.follows) or prepared.model
    if Ability.ADAPTERS not in abilities_of(importable(engine.engine, f"roles.{role}.engine")):
        yield f"roles.{role}.engine={engine.engine} takes whole models only"
    theirs, ours = engine.dtype or model.dtype, source.dtype or model.dtype
    if theirs != ours:
        yield f"it would read the model in {theirs}, and {engine.follows} trains the adapters on one in {ours}"
    if ENGINES.get(engine.engine) == ENGINES["vllm"]:
        found = pretrained.load_config(path, model.trust_remote_code)
        if refusal := vllm_adapters.refusal(lora, found):
            yield refusal
        kind = found.get_text_config().model_type
        if prepared.config.weights.lora is None and kind not in vllm_adapters.KNOWN:
            yield (
                f"Troupe does not know whether vLLM takes adapters of the type of model {kind!r}; weights.lora=adapter "
                "tries it"
            )
