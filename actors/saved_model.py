"""A model as a Hugging Face folder, written by all ranks: each writes the files of its share of the weights.

weights in their order │ a  b  c │ d  e │ f  g  h │     every rank goes through all of them, which gathers
files                  │  1 of 3 │  2   │    3    │     partitioned ones, and copies those of its own files
written by             │ rank 0  │ rank 1 │ rank 0│     rank 0 also writes the index, settings and tokenizer
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from actors.background_save import host_copy
from actors.lora import entries, write_adapter

SMALLEST_FILE = 256 * 2**20  # a smaller model is one file
LARGEST_FILE = 5 * 10**9
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class ModelPiece:
    """A rank's part of a model's folder. `weights` are all weights of `causal` by their saved names, whole, and each
    valid until the next. `save_tokenizer` is what else belongs into the folder."""

    def __init__(
        self,
        folder: Path,
        causal: Any,
        weights: Iterator[tuple[str, Tensor]],
        save_tokenizer: Callable[[Path], object],
        *,
        rank: int,
        ranks: int,
        smallest_file: int,
    ) -> None:
        self._folder, self._causal, self._weights, self._save_tokenizer = folder, causal, weights, save_tokenizer
        self._rank, self._ranks = rank, ranks
        total = sum(entry.nbytes for entry in entries(causal))
        self._file_bytes = min(max(-(-total // ranks), smallest_file), LARGEST_FILE)
        self._file_of: dict[str, int] = {}
        self._own: dict[int, dict[str, Tensor]] = {}
        self._nbytes = 0

    def copy(self) -> None:
        left_out: set[str] = set(self._causal._keys_to_ignore_on_save or ())
        for name, tensor in self._weights:
            if name not in left_out:
                file = self._nbytes // self._file_bytes  # in which the tensor begins
                self._nbytes += tensor.nbytes
                self._file_of[name] = file
                if file % self._ranks == self._rank:
                    self._own.setdefault(file, {})[name] = host_copy(tensor)

    def write(self) -> list[Path]:
        from safetensors.torch import save_file

        self._folder.mkdir(parents=True, exist_ok=True)
        numbers = {file: number for number, file in enumerate(sorted(set(self._file_of.values())), 1)}
        names = {file: f"model-{number:05d}-of-{len(numbers):05d}.safetensors" for file, number in numbers.items()}
        if len(names) == 1:
            names = dict.fromkeys(names, SINGLE)
        for file, tensors in self._own.items():
            save_file(tensors, self._folder / names[file], metadata={"format": "pt"})
        written = [self._folder / names[file] for file in self._own]
        self._own = {}
        return written + (self._write_settings(names) if self._rank == 0 else [])

    def _write_settings(self, names: dict[int, str]) -> list[Path]:
        """All files that hold no weights. They are written elsewhere and moved: in the folder itself, other ranks write
        meanwhile, under temporary names."""
        with tempfile.TemporaryDirectory(prefix=".settings-", dir=self._folder) as elsewhere:
            self._save_settings(Path(elsewhere))
            if len(names) > 1:
                placed = {name: names[file] for name, file in self._file_of.items()}
                index = {"metadata": {"total_size": self._nbytes}, "weight_map": placed}
                (Path(elsewhere) / INDEX).write_text(json.dumps(index, indent=2) + "\n")
            else:
                (self._folder / INDEX).unlink(missing_ok=True)
            return [_moved(file, self._folder / file.relative_to(elsewhere)) for file in _files(Path(elsewhere))]

    def _save_settings(self, folder: Path) -> None:
        """The names are those that `save_pretrained` gives."""
        from transformers.dynamic_module_utils import custom_object_save

        causal = self._causal
        causal.config.dtype = str(causal.dtype).removeprefix("torch.")
        causal.config.architectures = [type(causal).__name__]
        if causal.is_remote_code():
            custom_object_save(causal, str(folder), config=causal.config)
        causal.config.save_pretrained(folder)
        if causal.can_generate():
            causal.generation_config.save_pretrained(folder)
        self._save_tokenizer(folder)


class AdapterPiece:
    """The LoRA adapters alone, as a PEFT folder. `weights` are copies already; None on ranks that do not write."""

    def __init__(self, folder: Path, causal: Any, weights: dict[str, Tensor] | None) -> None:
        self._folder, self._causal, self._weights = folder, causal, weights

    def copy(self) -> None: ...

    def write(self) -> list[Path]:
        if self._weights is None:
            return []
        write_adapter(self._causal, self._folder, self._weights)
        return _files(self._folder)


def _moved(file: Path, to: Path) -> Path:
    to.parent.mkdir(parents=True, exist_ok=True)
    return file.replace(to)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())
