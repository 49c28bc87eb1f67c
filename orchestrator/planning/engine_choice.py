"""Which engine a role has where `roles.ROLE.engine` is `auto`: vLLM, or for short samples of a small model on a CPU
transformers, which makes twice as many of them in a second of processor time (docs/performance.md)."""

# pyright: basic
# (model configurations are typed in part only)

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from actors import pretrained
from orchestrator.config.roles import AUTO_ENGINE, EngineRole
from orchestrator.planning.prepared import Prepared
from rollout.short_samples import model_refusal, shape_of

LONG, SHORT = "vllm", "hf"
OF_LONG = ("kv_cache_gib", "tensor_parallel", "engine_options", "mixes")  # keys that are set for vLLM


def with_engines(prepared: Prepared) -> Prepared:
    """Every engine role that is launched with the name of an engine; `engine_notes` says of those that had none why it
    is that one."""
    roles, notes = prepared.config.roles, dict[str, str]()
    chosen: dict[str, EngineRole] = {}
    launched = prepared.plan().roles
    for role in launched:
        settings = roles[role]
        if isinstance(settings, EngineRole) and settings.engine == AUTO_ENGINE:
            why = next(_obstacles(prepared, settings), None)
            engine, why = (SHORT, "samples are short and the model is small") if why is None else (LONG, why)
            notes[role] = f"the engine {engine}, because {why}"
            chosen[role] = settings.model_copy(update={"engine": engine})
    config = prepared.config.model_copy(update={"roles": roles.model_copy(update=chosen)})
    return replace(prepared, config=config, engine_notes=notes)


def _obstacles(prepared: Prepared, engine: EngineRole) -> Iterator[str]:
    """Why a role's requests cannot all be decoded in passes of one shape (`rollout/fixed_rows.py`)."""
    if engine.gpus:
        yield "it has a GPU"
    default = EngineRole()  # pyright: ignore[reportCallIssue]
    for key in OF_LONG:
        if getattr(engine, key) != getattr(default, key):
            yield f"{key} is set"
    if any(phase.episode is not None for phase in prepared.phases):
        yield "episodes have several turns"
    longest = engine.max_model_len or prepared.longest
    if shape_of(longest, 0) is None:
        yield f"prompt and completion have up to {longest} tokens"
    path = prepared.models.get(engine.follows) or prepared.model
    parameters = (prepared.own_parameters or {}).get(engine.follows, prepared.parameters)
    if parameters is None:
        yield "the size of the model is not known"
    else:
        config = pretrained.load_config(path, prepared.config.model.trust_remote_code)
        if (refusal := model_refusal(config, parameters)) is not None:
            yield refusal
