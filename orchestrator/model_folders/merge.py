"""Several models merged into one, by the library mergekit; a single adapter merged into its base, by PEFT.

models ─► adapters merged into their bases ─► same shapes, same vocabulary? ─► mergekit ─► a plain Hugging Face folder

What is not here because no library that we could use does it: merging models of different shapes or vocabularies, and
merging adapters into one adapter without loss (PEFT's `add_weighted_adapter` combines the low-rank factors, which is
an approximation): the result of merging is always a whole model.
"""

# pyright: basic
# (mergekit, peft and transformers are typed in part only)

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from actors import pretrained
from actors.errors import ConfigError, ModelError
from orchestrator.model_folders.adapters import merge_adapter
from orchestrator.model_folders.export import SHARD_GIB, Exported, copy_beside, export, scratch_beside
from orchestrator.model_folders.found import base_of, find_model
from orchestrator.model_folders.weights_files import held_in, stored_tensors

OPTIONS = {  # of each way to merge: those that it takes
    "linear": ("weights",),
    "slerp": ("t",),
    "ties": ("weights", "density", "base"),
}
FLAGS = {"method": "--method", "weights": "--weight", "t": "--t", "density": "--density", "base": "--base"}
DENSITY, T = 0.5, 0.5
INSTALL = 'pip install "troupe[merge]"'


def merge(
    models: Sequence[str],
    target: str | Path,
    *,
    method: str | None = None,
    weights: Sequence[float] | None = None,
    t: float | None = None,
    density: float | None = None,
    base: str | None = None,
    dtype: str | None = None,
    shard_gib: float = SHARD_GIB,
    trust_remote_code: bool = False,
) -> Exported:
    """Write one model made of several to the new folder `target`. `models` are what `find_model` takes; an adapter
    counts as its base with the adapter merged. All must have the same shapes and the same vocabulary; tokenizer, chat
    template and generation config are the first one's.

    - one model, an adapter: merged into `base`, or into the model that it names;
    - `linear` (the default): the mean of the weights, weighted by `weights` (arXiv:2203.05482);
    - `slerp`, of two: spherical interpolation of each tensor, as one vector, `t` of the way from the first to the
      second;
    - `ties`: differences from `base`; of each, the `density` share that is largest stays; a sign is elected for each
      number, and what agrees with it is averaged, weighted by `weights` (arXiv:2306.01708).

    Raises ConfigError or ModelError before anything is written."""
    given = {"weights": None if weights is None else list(weights), "t": t, "density": density, "base": base}
    if len(models) == 1:
        _check_one(models[0], {"method": method, **given, "base": None})
        return export(
            models[0], target, base=base, dtype=dtype, shard_gib=shard_gib, trust_remote_code=trust_remote_code
        )
    method = _checked(method or "linear", len(models), given)
    _require_mergekit()
    with scratch_beside(Path(target)) as scratch:
        folders = [_whole(name, scratch / f"model-{n}", trust_remote_code) for n, name in enumerate(models)]
        against = None if base is None else find_model(base).path
        _refuse_different([*folders, *([against] if against else [])], [*models, *([base] if base else [])])
        own = held_in(stored_tensors(folders[0]))
        spec = _mergekit_config(method, folders, given, against, dtype or own or "float32")
        _run_mergekit(spec, scratch / "merged", trust_remote_code)
        copy_beside(folders[0], scratch / "merged")
        return export(str(scratch / "merged"), target, dtype=dtype, shard_gib=shard_gib)


def _check_one(model: str, given: dict[str, Any]) -> None:
    if named := [name for name, value in given.items() if value is not None]:
        raise ConfigError(f"{FLAGS[named[0]]} is for several models, and only {model} was given: name the others, too")
    if not find_model(model).adapter:
        raise ConfigError(f"{model} is a whole model and the only one: give several models, or one adapter's folder")


def _checked(method: str, count: int, given: dict[str, Any]) -> str:
    """The method. Raises ConfigError for options that it does not take, or that do not fit the models."""
    if method not in OPTIONS:
        raise ConfigError(f"--method {method}: it must be one of {', '.join(OPTIONS)}")
    for name, value in given.items():
        if value is not None and name not in OPTIONS[method]:
            takes = ", ".join(FLAGS[each] for each in OPTIONS[method])
            raise ConfigError(f"{FLAGS[name]} is not for --method {method}, which takes {takes}")
    weights = given["weights"]
    if weights is not None and len(weights) != count:
        raise ConfigError(f"--weight is given {len(weights)} times for {count} models: once for each, in their order")
    if weights is not None and sum(weights) == 0:
        raise ConfigError(
            f"--weight {' '.join(f'{each:g}' for each in weights)}: they add up to 0, and are divided by that"
        )
    if method == "slerp" and count != 2:
        raise ConfigError(f"--method slerp is between two models, and {count} were given")
    if method == "ties" and given["base"] is None:
        raise ConfigError(
            "--method ties merges differences from a base: name the model they were all trained from, --base"
        )
    for name in ("t", "density"):
        if (value := given[name]) is not None and not 0 <= value <= 1:
            raise ConfigError(f"{FLAGS[name]} {value:g} must be between 0 and 1")
    return method


def _whole(name: str, scratch: Path, trust_remote_code: bool) -> Path:
    """The folder of a model; of an adapter, its base with the adapter merged, made in `scratch`."""
    found = find_model(name)
    if not found.adapter:
        return found.path
    merge_adapter(found.path, base_of(found.path), scratch, trust_remote_code)
    return scratch


def _refuse_different(folders: Sequence[Path], names: Sequence[str]) -> None:
    """Raises ModelError unless all have the same weights, by name and shape, and the same vocabulary: a merge of
    others would be numbers without a meaning."""
    first = {name: each.shape for name, each in stored_tensors(folders[0]).items()}
    vocabulary = _vocabulary(folders[0])
    for folder, name in zip(folders[1:], names[1:], strict=True):
        shapes = {tensor: each.shape for tensor, each in stored_tensors(folder).items()}
        if odd := sorted(each for each in {*first, *shapes} if first.get(each) != shapes.get(each)):
            said = ", ".join(
                f"{each} {first.get(each, 'missing')} and {shapes.get(each, 'missing')}" for each in odd[:2]
            )
            raise ModelError(
                f"{names[0]} and {name} cannot be merged: {len(odd)} of their weights differ in name or shape "
                f"({said}); models are merged that were trained from the same one"
            )
        other = _vocabulary(folder)
        if odd := [token for token in {*vocabulary, *other} if vocabulary.get(token) != other.get(token)]:
            raise ModelError(
                f"{names[0]} and {name} cannot be merged: {len(odd)} tokens of their vocabularies differ, e.g. "
                f"{min(odd)!r} is {vocabulary.get(min(odd), 'none')} and {other.get(min(odd), 'none')}"
            )


def _vocabulary(folder: Path) -> dict[str, int]:
    return dict(pretrained.load_tokenizer(str(folder), False).get_vocab())


def _require_mergekit() -> None:
    try:
        _mergekit("config")
    except ImportError as error:
        raise ConfigError(f"merging several models needs mergekit, and there is none ({error}): {INSTALL}") from None


def _mergekit(module: str) -> Any:
    """By name: it is an optional dependency, which the type checker need not find."""
    return importlib.import_module(f"mergekit.{module}")


def _mergekit_config(
    method: str, folders: Sequence[Path], given: dict[str, Any], base: Path | None, dtype: str
) -> dict[str, Any]:
    """In mergekit's own terms. Sums are computed in float32, whatever type the result has."""
    types = {"dtype": "float32", "out_dtype": dtype, "merge_method": method}
    weights = given["weights"] or [1.0] * len(folders)
    if method == "slerp":
        t = T if given["t"] is None else given["t"]
        models = [{"model": str(folder)} for folder in folders]
        return {**types, "models": models, "base_model": str(folders[0]), "parameters": {"t": t}}
    of_each: list[dict[str, Any]] = [{"weight": weight} for weight in weights]
    if method == "ties":
        density = DENSITY if given["density"] is None else given["density"]
        of_each = [{**each, "density": density} for each in of_each]
    models = [{"model": str(folder), "parameters": each} for folder, each in zip(folders, of_each, strict=True)]
    against = {} if base is None else {"base_model": str(base)}
    return {**types, **against, "models": models, "parameters": {"normalize": True}}


def _run_mergekit(spec: dict[str, Any], target: Path, trust_remote_code: bool) -> None:
    options = _mergekit("options").MergeOptions(
        copy_tokenizer=False, write_model_card=False, quiet=True, trust_remote_code=trust_remote_code
    )
    try:
        checked = _mergekit("config").MergeConfiguration.model_validate(spec)
        _mergekit("merge").run_merge(checked, str(target), options)
    except (RuntimeError, ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise ModelError(
            f"mergekit cannot merge these models: {shorten(str(error), 300, placeholder=' ...')}"
        ) from error
