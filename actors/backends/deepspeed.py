"""DeepSpeed: ZeRO stages 0 to 3 over gloo on CPUs and NCCL on GPUs, any DeepSpeed configuration passed through.

    stage 0   every rank holds everything; gradients are summed at the step (data parallelism)
    stage 1   optimizer states are partitioned          stage 2   gradients too          stage 3   parameters too

This file makes DeepSpeed agree with the other backends: gradients are *summed* over ranks (DeepSpeed averages them, so
the loss is scaled by the world size), the gradient norm is always known, weights are exported whole, in buckets, with
adapters merged, and a frozen role needs no optimizer. In bfloat16, gradients are accumulated and applied in float32, as
in `single`.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from actors import saved_state
from actors.backends import deepspeed_config
from actors.backends.optimizer import StepInfo, build_optimizer, build_schedule, set_hyperparameters
from actors.backends.parking import Sleeper
from actors.backends.placement import Placement, device_of
from actors.background_save import StateFile
from actors.errors import ConfigError
from actors.lora import EXPORTS, adapter_weights, adapters_off, has_adapters
from actors.model import LanguageModel, ModelSpec, load_model
from actors.specs import BackendSpec, OptimSpec, WeightsForm
from actors.weight_shares import Slices
from actors.weight_swap import Instead, mix_in, replaced

COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # of one collective; after it, the waiting ranks raise
LAYOUT_FILE = "layout.json"
TAG = "deepspeed"


class ProcessGroupWorld:
    """Statistics over the ranks of torch's default process group."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device = device  # NCCL transfers only tensors that are on the GPU

    def sum(self, values: Tensor) -> Tensor:
        total = values.detach().to(self._device, copy=True)
        dist.all_reduce(total)
        return total.to(values.device)

    def gather(self, values: Tensor) -> Tensor:
        own = values.detach().to(self._device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(own)], device=self._device))
        longest = max(int(size) for size in sizes)
        padded = torch.cat([own, own.new_zeros(longest - len(own))])
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)]).to(values.device)


class DeepSpeedBackend:
    """See `actors.backends.protocol.Backend`. Resumption is exact to the bit at the same number of ranks."""

    def __init__(self, model: ModelSpec, spec: BackendSpec, placement: Placement) -> None:
        self.device = device_of(spec.gpus, available=torch.cuda.is_available())
        self._sleeper = Sleeper(self.device)
        self._deepspeed = _import_deepspeed(self.device)
        _join(placement, self.device)
        self._deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        self.world = ProcessGroupWorld(self.device)
        self._dtype, self._spec, self._optim = model.dtype, spec, spec.optim
        self._config = self._resolved(spec.optim)
        self._stage = deepspeed_config.zero_stage_of(self._config)
        self._module = self._load(model, trainable=spec.optim is not None)
        engaged = spec.optim is not None or self._stage == 3  # a frozen model that is not partitioned is just a module
        self._engine: Any = self._initialize(spec.optim) if engaged else None
        self.model: nn.Module = self._engine or self._module

    def _resolved(self, optim: OptimSpec | None) -> dict[str, Any]:
        return deepspeed_config.resolve(
            self._spec.deepspeed,
            zero_stage=self._spec.zero_stage,
            dtype=self._dtype,
            optim=optim,
            world_size=self.world.size,
        )

    def _load(self, model: ModelSpec, *, trainable: bool) -> LanguageModel:
        """The model. In stage 3, each rank keeps only its share of a weight as soon as it is read, so that a model too
        large for one rank can be loaded."""
        if self._stage != 3:
            return load_model(model, self.device, trainable=trainable)
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        partition_on_load = HfDeepSpeedConfig(self._config)  # takes effect while the object exists
        loaded = load_model(model, self.device, trainable=trainable)
        del partition_on_load
        return loaded

    def _initialize(self, optim: OptimSpec | None) -> Any:
        """DeepSpeed's engine. Raises ConfigError if DeepSpeed refuses its configuration."""
        parts: dict[str, Any] = {}
        if optim is not None:
            optimizer = build_optimizer(self._trained(), optim)
            if "optimizer" in self._config:
                parts["model_parameters"] = [
                    {k: g[k] for k in ("params", "weight_decay")} for g in optimizer.param_groups
                ]
            else:
                parts["optimizer"] = optimizer
            parts["lr_scheduler"] = lambda base: build_schedule(base, optim)
        try:
            engine = self._deepspeed.initialize(model=self._module, config=self._config, **parts)[0]
        except (ValueError, TypeError, AssertionError, self._deepspeed.DeepSpeedConfigError) as error:
            raise ConfigError(f"DeepSpeed refuses its configuration: {error}") from error
        if optim is not None and self._stage == 0 and self._dtype != "float32":
            # DeepSpeed makes this optimizer's moments by a step on zero gradients: undo its weight decay and its count.
            engine.optimizer.refresh_fp32_params()
            _forget_moments(_innermost(engine.optimizer))
        return engine

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, weight) for name, weight in self._module.named_parameters() if weight.requires_grad]

    def reset_optimizer(self, optim: OptimSpec) -> None:
        """New moments and schedule for the same weights. In place, because the partitions refer to the moments."""
        if "optimizer" in self._config:
            raise ConfigError(
                "a DeepSpeed configuration with its own `optimizer` works for one phase only; remove that section"
            )
        clipping = self._resolved(optim)["gradient_clipping"]
        _forget_moments(_innermost(self._engine.optimizer))
        self._optim = optim
        self._configure(clipping, steps_done=0)

    def _configure(self, clipping: float, steps_done: int) -> None:
        """Set the optimizer and its schedule to the phase's settings, as they are after `steps_done` steps."""
        assert self._optim is not None
        optimizer = _innermost(self._engine.optimizer)
        set_hyperparameters(optimizer, build_optimizer(self._trained(), self._optim))
        self._engine.lr_scheduler = build_schedule(optimizer, self._optim, steps_done)
        self._engine._config.gradient_clipping = clipping
        if hasattr(self._engine.optimizer, "clip_grad"):
            self._engine.optimizer.clip_grad = clipping

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.world.size)

    def step(self) -> StepInfo:
        learning_rate = self._engine.get_lr()[0]
        # In stage 0 with float32, DeepSpeed reports no norm; but there each rank has the whole gradient at this point.
        reported = self._stage > 0 or self._dtype != "float32"
        norm = (
            None
            if reported
            else torch.nn.utils.get_total_norm(w.grad for _, w in self._trained() if w.grad is not None)
        )
        self._engine.step()
        return StepInfo(float(self._engine.get_global_grad_norm() if norm is None else norm), learning_rate)

    @property
    def partitioned(self) -> bool:
        return self._stage == 3

    def full_weights(
        self, bucket_bytes: int, form: WeightsForm = "merged", instead: Instead | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        causal = self._module.causal
        return EXPORTS[form](causal, bucket_bytes, replaced(self._gathered, causal, instead))

    def adapter_weights(self, instead: Instead | None = None) -> dict[str, Tensor]:
        causal = self._module.causal
        return adapter_weights(causal, replaced(self._gathered, causal, instead))

    def trained_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self._module.causal.named_parameters():
            if weight.requires_grad:
                master = self._deepspeed.utils.safe_get_full_fp32_param(weight)
                # None in stage 0 with float32, where the weight is its own master copy.
                yield name, weight.detach() if master is None else master

    def own_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self._module.causal.named_parameters():
            if not weight.requires_grad:
                continue
            if self._stage == 3:
                yield name, self._deepspeed.utils.safe_get_local_fp32_param(weight)
            elif not hasattr(weight, "_hp_mapping"):  # stage 0 with float32: the weight is its own master copy
                yield name, weight.detach()
            elif weight._hp_mapping is not None:  # None: no part of it is in this rank's partition
                yield name, weight._hp_mapping.get_hp_fragment()

    def mix(self, slices: Slices, share: float, bucket_bytes: int) -> None:
        mix_in(self._module.causal, slices, share, bucket_bytes, self._written_slices, self.world, _is_partitioned)

    def _gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        """Makes the parameters whole on every rank while the context lasts."""
        return nullcontext() if self._stage != 3 else self._deepspeed.zero.GatheredParameters(parameters)

    @contextmanager
    def _written_slices(self, parameters: list[nn.Parameter]) -> Generator[None]:
        """`_gathered`; of what was written into parameters meanwhile, each rank keeps its own slice. DeepSpeed's
        `GatheredParameters` would send what rank 0 wrote to all ranks."""
        distinct = {id(each): each for each in parameters if _is_partitioned(each)}
        partitioned: Any = sorted(distinct.values(), key=lambda each: each.ds_id)  # pyright: ignore[reportAttributeAccessIssue]
        if partitioned:
            partitioned[0].all_gather(param_list=partitioned)
        try:
            yield
        finally:
            if partitioned:
                partitioned[0].partition(param_list=partitioned, has_been_updated=True)

    def adapters_off(self) -> AbstractContextManager[None]:
        return adapters_off(self._module)

    def state(self, folder: Path) -> list[StateFile]:
        """Each rank's share; with adapters, without the frozen base model. DeepSpeed decides what is in it and hands it
        to its checkpoint engine, which for this moment is one that only remembers."""
        if self._spec.optim is None:
            return []
        if self.world.rank == 0:
            (folder / LAYOUT_FILE).write_text(json.dumps(self._layout))
        frozen = has_adapters(self._module)
        writer, remembering = self._engine.checkpoint_engine, _remembering(folder)
        self._engine.checkpoint_engine = remembering
        try:
            self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=frozen)
        finally:
            self._engine.checkpoint_engine = writer
        return remembering.files

    def load_state(self, folder: Path) -> None:
        if self._spec.optim is None:
            return
        if not (folder / LAYOUT_FILE).exists():
            raise ConfigError(f"{folder} holds no state of backend 'deepspeed'; resume with the backend that saved it")
        saved = json.loads((folder / LAYOUT_FILE).read_text())
        if saved != self._layout:
            raise ConfigError(_mismatch(folder, saved, self._layout))
        strict = not has_adapters(self._module)
        with saved_state.data_only(folder, _parts_of_its_state()):
            loaded, _ = self._engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=strict)
        if loaded is None:
            raise ConfigError(f"{folder} lacks files of backend 'deepspeed'; resume from another checkpoint")
        assert self._optim is not None
        # DeepSpeed has also restored the settings of the run that saved; the present ones apply.
        self._configure(self._resolved(self._optim)["gradient_clipping"], self._engine.lr_scheduler.last_epoch)

    @property
    def _layout(self) -> dict[str, int]:
        return {"ranks": self.world.size, "zero_stage": self._stage}

    def sleep(self) -> None:
        self._sleeper.sleep(*self.held)

    def wake(self) -> None:
        self._sleeper.wake()

    @property
    def held(self) -> tuple[Any, ...]:
        """The objects that hold tensors: the model, and DeepSpeed's flat buffers, partitions and moments."""
        return self._module, self._engine


def _import_deepspeed(device: torch.device) -> Any:
    """Imports DeepSpeed with the accelerator set and compilation at start-up switched off."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ["LOCAL_RANK"] = "0"  # Ray shows a process only its own GPUs, so the first is its own
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"backend 'deepspeed' needs the package deepspeed ({error}); install it or use 'single'"
        ) from None
    accelerator: Any = deepspeed.accelerator.get_accelerator()
    computing = accelerator.device_name()
    if computing != device.type:
        raise ConfigError(
            f"DeepSpeed computes on {computing} in this process, but a role in it needs {device.type} (by its `gpus`); "
            "unset DS_ACCELERATOR, and with --local give all DeepSpeed roles a GPU, or none of them"
        )
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
        False  # it would compile for half a minute; gloo does the same
    )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It uses collectives that torch has deprecated; a reader of a run's output can do nothing about that.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    return deepspeed


def _join(placement: Placement, device: torch.device) -> None:
    """Create torch's default process group, at the store `master`, which exists; a single rank makes its own."""
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (placement.rank, placement.world_size):
            raise ConfigError("one process cannot be a rank of two groups of different size")
        return
    alone = placement.master is None
    if alone and placement.world_size > 1:
        raise ConfigError(f"{placement.world_size} ranks need a `master` address to meet at")
    host, port = placement.master or ("127.0.0.1", 0)
    store = TCPStore(host, port, is_master=alone, wait_for_workers=False, timeout=COLLECTIVE_TIMEOUT)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=placement.rank,
        world_size=placement.world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )


def _is_partitioned(weight: Tensor) -> bool:
    return hasattr(weight, "ds_id")  # of ZeRO stage 3


def _remembering(folder: Path) -> Any:
    """A checkpoint engine of DeepSpeed's that writes nothing, and has what it was given as `files`."""
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    class Remembering(CheckpointEngine):
        def __init__(self) -> None:
            super().__init__()
            self.files: list[StateFile] = []

        def create(self, info: Any) -> None: ...

        def commit(self, info: Any) -> None: ...

        def save(self, state_dict: Any, path: str) -> None:
            self.files.append(StateFile(str(Path(path).relative_to(folder)), state_dict, plain=False))

        def load(self, path: str, map_location: Any = None) -> Any:
            raise NotImplementedError("this checkpoint engine is for one save")

        def preserves_storage_sharing(self) -> Any:
            return False  # every tensor is copied by itself

    return Remembering()


def _parts_of_its_state() -> list[type]:
    """DeepSpeed's classes that occur in its checkpoints. They hold data and run no code when they are loaded."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    """torch's optimizer inside DeepSpeed's wrappers."""
    while not isinstance(optimizer, torch.optim.AdamW):
        optimizer = optimizer.optimizer
    return optimizer


def _forget_moments(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        for moment in state.values():
            moment.zero_()


def _mismatch(folder: Path, saved: dict[str, int], now: dict[str, int]) -> str:
    before, here = (f"{at['ranks']} rank(s) in ZeRO stage {at['zero_stage']}" for at in (saved, now))
    return (
        f"{folder} was saved by {before}, this role has {here}; optimizer states are partitioned, so resume with "
        f"ranks={saved['ranks']} and zero_stage={saved['zero_stage']}, or start a new run from the saved model folder"
    )
