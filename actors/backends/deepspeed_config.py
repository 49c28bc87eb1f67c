"""Completes a user's DeepSpeed configuration. All keys are passed on; a few must agree with the run's settings: if
absent or "auto", they are filled in; if different, an error says where to set them instead.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.errors import ConfigError
from actors.specs import OptimSpec

AUTO = "auto"
Json = dict[str, Any]


def resolve(
    given: Mapping[str, Any] | Path | str | None,
    *,
    zero_stage: int,
    dtype: str,
    optim: OptimSpec | None,
    world_size: int,
) -> Json:
    """The whole configuration for `deepspeed.initialize`. Without `optim` the role is frozen. Raises ConfigError."""
    config = _load(given)
    _own(config, "train_micro_batch_size_per_gpu", 1, "rows are dealt to micro-batches by train.token_budget")
    _own(config, "gradient_accumulation_steps", 1, "micro-batches follow from train.batch_size and train.token_budget")
    _own(config, "train_batch_size", world_size, "set train.batch_size instead")
    for section, name in (("bf16", "bfloat16"), ("fp16", "float16")):
        _own(_section(config, section), "enabled", dtype == name, f"set model.dtype={name} instead", f"{section}.")
    if dtype == "bfloat16":
        # It looks for overflow in each gradient by itself, six passes over all of them, and skips the step. Without it,
        # the norm says as much, and a step whose norm is not finite ends the run, as with `single`.
        _section(config, "bf16").setdefault("check_grad_overflow", False)
    stage = _section(config, "zero_optimization").setdefault("stage", zero_stage)
    if dtype == "bfloat16" and stage > 0:
        # Gradients of micro-batches are summed; in bfloat16, small ones would be rounded away. DeepSpeed's stage 0 has
        # no such setting.
        _section(config, "data_types").setdefault("grad_accum_dtype", "fp32")
    # torch's own AdamW also where the optimizer's state is offloaded, so that nothing is compiled at start-up.
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    if optim is None:
        return _frozen(config)
    own_clipping(config, optim)
    _own_optimizer(config, optim)
    if config.pop("scheduler", AUTO) != AUTO:
        raise ConfigError(_refusal("scheduler", "a schedule", "set train.scheduler and train.warmup_steps instead"))
    return config


def own_clipping(config: Json, optim: OptimSpec) -> None:
    _own(config, "gradient_clipping", optim.max_grad_norm or 0.0, "set train.max_grad_norm instead")


def zero_stage_of(config: Json) -> int:
    return int(config["zero_optimization"]["stage"])


def _load(given: Mapping[str, Any] | Path | str | None) -> Json:
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return copy.deepcopy(dict(given))
    try:
        loaded = json.loads(Path(given).read_text())
    except OSError as error:
        raise ConfigError(f"the DeepSpeed configuration {given} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"the DeepSpeed configuration {given} is not JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"the DeepSpeed configuration {given} holds a {type(loaded).__name__}, not an object")
    return loaded


def _section(config: Json, name: str) -> Json:
    section = config.setdefault(name, {})
    if not isinstance(section, dict):
        raise ConfigError(f"`{name}` in the DeepSpeed configuration must be an object, got {section!r}")
    return section


def _own(config: Json, key: str, value: Any, advice: str, prefix: str = "") -> None:
    """Set a key whose value the run determines; a different value from the user is refused, never overwritten."""
    given = config.get(key, AUTO)
    if given != AUTO and given != value:
        raise ConfigError(_refusal(prefix + key, repr(given), f"the run has {value!r}; {advice}"))
    config[key] = value


def _own_optimizer(config: Json, optim: OptimSpec) -> None:
    """A section `optimizer` selects another optimizer; keys that `train` determines may be absent or "auto"."""
    if config.get("optimizer", AUTO) == AUTO:
        config.pop("optimizer", None)
        return
    optimizer = _section(config, "optimizer")
    params = _section(optimizer, "params")
    ours = {
        "lr": optim.learning_rate,
        "betas": list(optim.adam_betas),
        "eps": optim.adam_eps,
        "weight_decay": optim.weight_decay,
    }
    # Every kind of Adam takes all four; another optimizer takes a rate, and those of the others that the user gave.
    takes = ours.keys() if "adam" in str(optimizer.get("type", "")).lower() else ours.keys() & params.keys() | {"lr"}
    for key in takes:
        _own(
            params, key, ours[key], f"set train.{'learning_rate' if key == 'lr' else key} instead", "optimizer.params."
        )


def _frozen(config: Json) -> Json:
    """For a frozen role: no optimizer, and no partitions unless the parameters are partitioned (stage 3)."""
    for key in ("optimizer", "scheduler", "gradient_clipping", "data_types"):
        config.pop(key, None)
    zero = config["zero_optimization"]
    zero.pop("offload_optimizer", None)
    if zero["stage"] != 3:
        zero["stage"] = 0
    return config


def _refusal(key: str, given: str, advice: str) -> str:
    return f'`{key}` in the DeepSpeed configuration is {given}, which the run decides: {advice}, or write "auto" there'
