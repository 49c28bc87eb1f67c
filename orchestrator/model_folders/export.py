"""A checkpoint, a phase or any model folder as a plain Hugging Face folder, which nothing of Troupe is needed to load.

found model ─► weights cast and sharded ─► config, generation config, tokenizer, chat template ─► renamed to TARGET
"""

# pyright: basic
# (transformers is typed in part only)

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.errors import ConfigError, ModelError
from actors.pretrained import ADAPTER_CONFIG
from actors.saved_state import writing
from orchestrator.model_folders.adapters import merge_adapter
from orchestrator.model_folders.found import ModelFolder, Wanted, base_of, find_model
from orchestrator.model_folders.weights_files import DTYPES, Stored, held_in, stored_tensors, write_weights

SHARD_GIB = 5.0  # what the Hugging Face hub advises
BESIDE = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")  # config, tokenizer, templates, code of the model
TOKENIZER_CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"


@dataclass(frozen=True)
class Exported:
    """What was written. `dtype`: of most weights; `files`: names of the files with weights; `missing`: parts of a
    model folder that the source does not have."""

    folder: Path
    kind: str
    parameters: int
    dtype: str | None
    files: tuple[str, ...]
    missing: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}


def export(
    source: str,
    target: str | Path,
    *,
    step: int | None = None,
    phase: str | None = None,
    role: str | None = None,
    averaged: bool = False,
    adapter: bool = False,
    dtype: str | None = None,
    shard_gib: float = SHARD_GIB,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> Exported:
    """Write the model that `source` stands for to the new folder `target`. `step`, `phase`, `role`, `averaged` and
    `adapter` say which of a run's models it is (see `Wanted`).

    Of a run with LoRA, and of an adapter's folder, that is the model with the adapters merged; with `adapter` the
    adapter alone, as PEFT has it. `base`: the model that an adapter's folder is for, unless its configuration says
    so. Raises ConfigError or ModelError before anything is written, DiskError if the disk does not take it; then
    nothing is left behind."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: it must be one of {', '.join(DTYPES)}")
    if shard_gib <= 0:
        raise ConfigError(f"--shard-gib {shard_gib:g}: files must have a size above 0")
    wanted = Wanted(role=role, averaged=averaged, adapter=adapter, step=step, phase=phase)
    found, target = find_model(source, wanted), Path(target)
    if base is not None and (not found.adapter or adapter):
        raise ConfigError(f"--base {base}: a base is for an adapter that is to be merged, and {source} is none")
    if found.adapter and adapter:
        if dtype is not None:
            raise ConfigError(
                f"--dtype {dtype}: an adapter is written as it was trained; leave out --adapter or --dtype"
            )
        return _written(target, lambda folder: _copy_adapter(found, folder, target))
    if not found.adapter:
        return _written(target, lambda folder: _copy_model(found.path, folder, target, dtype, shard_gib))
    with scratch_beside(target) as scratch:
        merge_adapter(found.path, base or base_of(found.path), scratch, trust_remote_code)
        return _written(target, lambda folder: _copy_model(scratch, folder, target, dtype, shard_gib))


def _written(target: Path, write: Callable[[Path], Exported]) -> Exported:
    with new_folder(target) as folder:
        return write(folder)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` if the block ends well, and is removed if not."""
    refuse_existing(target)
    folder = Path(tempfile.mkdtemp(dir=_parent(target), prefix=f".{target.name}-"))
    try:
        with writing(target):
            yield folder
            _readable(folder)
            if target.is_dir():
                target.rmdir()
            folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _readable(folder: Path) -> None:
    """For whom the user's umask says: temporary folders, and what safetensors writes, are for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~umask)


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A folder for intermediate models, on the disk that has room for the result; removed afterwards."""
    refuse_existing(target)
    with tempfile.TemporaryDirectory(dir=_parent(target), prefix=".merging-") as folder, writing(target):
        yield Path(folder)


def refuse_existing(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty: give the name of a new folder, or remove it first")


def _parent(target: Path) -> Path:
    """Beside the target: a rename moves nothing."""
    parent = target.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{target}: no folder can be made there: {error.strerror}") from None
    return parent


def _copy_model(source: Path, folder: Path, target: Path, dtype: str | None, shard_gib: float) -> Exported:
    config = json.loads((source / "config.json").read_text())
    tensors = stored_tensors(source)
    if dtype is not None and config.get("quantization_config") is not None:
        raise ModelError(f"{source} is quantised, so its numbers cannot be cast: leave out --dtype {dtype}")
    files = write_weights(tensors, folder, dtype=dtype, shard_gib=shard_gib)
    copy_beside(source, folder)
    written = stored_tensors(folder)
    if odd := [name for name in {*tensors, *written} if _shape(tensors, name) != _shape(written, name)]:
        raise ModelError(f"{target} would lack or change weights of {source}: {', '.join(sorted(odd)[:4])}")
    if dtype is not None:
        config.pop("torch_dtype", None)  # the key of older transformers, which newer ones read, too
        (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n")
    _write_generation_config(config, folder)
    numbers = sum(math.prod(each.shape) for each in written.values())
    kind = (config.get("architectures") or ["model"])[0]
    return Exported(target, kind, numbers, held_in(written), tuple(file.name for file in files), _missing(folder))


def _shape(tensors: dict[str, Stored], name: str) -> tuple[int, ...] | None:
    return tensors[name].shape if name in tensors else None


def copy_beside(source: Path, folder: Path) -> None:
    """Everything that is no weights: configuration, tokenizer, chat template, the model's own code, licence."""
    for file in sorted(source.iterdir()):
        wanted = file.suffix in BESIDE or file.name.upper().startswith("LICENSE")
        if file.is_file() and wanted and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)  # not copy2: a cache of the hub has read-only files


def _copy_adapter(found: ModelFolder, folder: Path, target: Path) -> Exported:
    """The adapter's files, and the tokenizer that it was trained with, where that is known."""
    for file in found.path.iterdir():
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    if found.tokenizer is not None:
        for file in found.tokenizer.iterdir():
            if file.name.startswith(("tokenizer", "special_tokens", "vocab", "merges", "chat_template")):
                shutil.copyfile(file, folder / file.name)
    weights = sorted(file.name for file in folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{found.path} holds {ADAPTER_CONFIG} and no weights in safetensors")
    from safetensors import safe_open

    numbers = 0
    for name in weights:
        with safe_open(folder / name, "pt") as opened:
            numbers += sum(math.prod(opened.get_slice(key).get_shape()) for key in opened.keys())  # noqa: SIM118
    kind = str(json.loads((folder / ADAPTER_CONFIG).read_text()).get("peft_type", "adapter"))
    without = () if (folder / TOKENIZER_CONFIG).is_file() else ("tokenizer",)
    return Exported(target, f"PEFT {kind}", numbers, None, tuple(weights), without)


def _write_generation_config(config: dict[str, Any], folder: Path) -> None:
    """For a model that generates and whose folder has none: servers read from it which tokens end a completion."""
    writes = any(name.endswith("ForCausalLM") for name in config.get("architectures") or [])
    if not writes or (folder / GENERATION).is_file():
        return
    ids = {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    known = {name: value for name, value in ids.items() if value is not None}
    (folder / GENERATION).write_text(json.dumps({"_from_model_config": True, **known}, indent=2) + "\n")


def _missing(folder: Path) -> tuple[str, ...]:
    """What a user may look for in vain."""
    if not (folder / TOKENIZER_CONFIG).is_file() and not (folder / "tokenizer.json").is_file():
        return ("tokenizer", "chat template")
    settings = json.loads((folder / TOKENIZER_CONFIG).read_text()) if (folder / TOKENIZER_CONFIG).is_file() else {}
    template = bool(settings.get("chat_template")) or (folder / "chat_template.jinja").is_file()
    return () if template else ("chat template",)
