"""vLLM in this process, stepped by the thread that owns it.

There is no separate engine process: `LLMEngine` without multiprocessing starts in seconds and accepts new weights
between two steps. Each sample of a request is a vLLM request with its own seed, so that it depends neither on the other
requests nor on the worker; the prefix cache shares the prompt."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from actors.errors import ConfigError, DataFailure, InfraFailure
from actors.gloo_devices import shared_gloo_device
from actors.pretrained import check_folder
from rollout.engine import CPU_KV_CACHE_GIB, Ability, EngineSpec, Finished
from rollout.sampling import Completion, Finish, PromptTopK, Request, sample_seed
from rollout.stopping import end_token_ids, token_budget
from rollout.vllm_adapters import Adapters
from rollout.vllm_build import refusal_without_gpus
from rollout.vllm_mixture import MIXTURE, SecondModel
from rollout.vllm_processes import EngineProcesses
from rollout.vllm_weights import put, receive
from rollout.weights.protocol import SyncOrder

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine

ENVIRONMENT = {  # vLLM and torch read these when they are imported
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine steps in this process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise each tensor-parallel worker needs a NUMA node of its own
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # for tensor-parallel workers: a forked process with threads may hang
}


CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # supported by vLLM's attention on a CPU


@dataclass
class _Running:
    """A request whose samples are not all finished."""

    request: Request
    completions: list[Completion] = field(default_factory=list)


class VllmEngine:
    """`options` are `EngineArgs` of vLLM and win over what is derived from the specification. A second model
    (`EngineSpec.mixes`) is one of transformers in this process, outside vLLM's key-value cache and memory budget."""

    abilities = frozenset(
        {
            Ability.ADAPTERS,
            Ability.ADMITTED,
            Ability.FLOAT32_HEAD,
            Ability.MIXES,
            Ability.PROMPT_TOP_K,
            Ability.SHARDED,
        }
    )

    def __init__(self, spec: EngineSpec) -> None:
        check_folder(spec.model)
        if spec.gpus == 0 and (refusal := refusal_without_gpus("<role>")):
            raise ConfigError(refusal)
        if spec.mixes is not None and spec.tensor_parallel > 1:
            raise ConfigError(
                f"tensor_parallel={spec.tensor_parallel} of an engine that mixes in {spec.mixes}: both models must be "
                "in one process; set it to 1"
            )
        self._max_model_len = spec.max_model_len
        self._end_ids = end_token_ids(spec.model, spec.trust_remote_code)
        self.device = torch.device("cuda" if spec.gpus > 0 else "cpu")
        self._second = None if spec.mixes is None else SecondModel(spec, spec.mixes, self.device)
        self._adapters = None if spec.lora is None else Adapters(spec.lora)
        self._llm = _start(spec, self._second, self._adapters)
        self._processes = EngineProcesses(self._llm)
        self._running: dict[str, _Running] = {}
        self.version = -1

    @property
    def version(self) -> int:
        return self._version

    @version.setter
    def version(self, version: int) -> None:
        self._version = version
        self._llm.set_weight_version(str(version))  # from here on vLLM reports it for every token

    def add(self, request: Request) -> None:
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input

        if request.mixture and self._second is None:
            raise DataFailure(f"request {request.id}: it mixes two models, and the engine was built with one")
        budget = token_budget(request, self._max_model_len)
        adapters = None if self._adapters is None else self._adapters.request
        self._running[request.id] = _Running(request)
        try:
            params, prompt = self._sampling_params(request, budget), tokens_input(list(request.prompt))
            for index in range(request.n):
                params.seed = sample_seed(request.seed, index)
                name = _sample_id(request.id, index)
                self._llm.add_request(name, prompt, params, lora_request=adapters)  # which copies the parameters
        except (ValueError, VLLMClientError) as error:
            self.abort(request.id)
            raise DataFailure(f"request {request.id}: vLLM refuses it: {error}") from error

    def abort(self, request_id: str) -> None:
        running = self._running.pop(request_id, None)
        if running is not None:
            self._llm.abort_request([_sample_id(request_id, index) for index in range(running.request.n)])

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def step(self) -> list[Finished]:
        finished: list[Finished] = []
        with self._processes.named():
            outputs = cast("list[RequestOutput]", self._llm.step())
        for output in outputs:
            request_id, _, index = output.request_id.rpartition("#")
            running = self._running[request_id]
            asked = running.request.sampling
            completion = _completion(int(index), output.outputs[0], asked.top_k if asked.records_admitted else 0)
            if running.request.prompt_top_k:
                completion = replace(completion, prompt=_of_prompt(output, running.request.prompt_top_k))
            running.completions.append(completion)
            if len(running.completions) == running.request.n:
                del self._running[request_id]
                finished.append(Finished(running.request, running.completions))
        return finished

    @property
    def kv_cache_use(self) -> float:
        """The share of the key-value cache that the running requests hold: 0 to 1."""
        core: Any = self._llm.engine_core
        return float(core.engine_core.scheduler.kv_cache_manager.usage)

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Requests in flight compute their keys and values again under the new weights: every token's log-probability
        is that of one version alone. Refused with several processes, of which each would get a copy of all weights."""
        count = self._llm.vllm_config.parallel_config.tensor_parallel_size
        if count > 1:
            raise InfraFailure(
                f"an engine of {count} processes takes no weights by `load`: order each to `receive` them"
            )
        self._llm.collective_rpc(partial(put, weights=weights))
        self._forget_keys_and_values()
        self.version = version

    def receive(self, names: Sequence[str], order: SyncOrder, payload: Any) -> str:
        with self._processes.named():
            fingerprint = receive(self._llm, names, order, payload)
        self._forget_keys_and_values()
        self.version = order.version
        return fingerprint

    def load_adapters(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        assert self._adapters is not None, "the engine was built without adapters"
        with self._processes.named():
            self._adapters.load(self._llm, weights)
        self._forget_keys_and_values()
        self.version = version

    def _forget_keys_and_values(self) -> None:
        if not self._llm.reset_prefix_cache(reset_running_requests=True):
            raise InfraFailure(
                "vLLM could not reset its prefix cache, and would go on with the old weights' keys and values"
            )

    def load_second(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        assert self._second is not None, "the engine was built with one model"
        self._second.load(weights)

    def sleep(self) -> None:
        if self.device.type != "cpu":  # a CPU has no memory to release
            self._llm.sleep(level=1)

    def wake(self) -> None:
        if self.device.type != "cpu":
            self._llm.wake_up()

    def close(self) -> None:
        self._llm.engine_core.shutdown()

    def _sampling_params(self, request: Request, budget: int) -> SamplingParams:
        """All but the seed. Made once per request, because to check and copy them deeply for each of many short samples
        takes as long as a quarter of the sampling."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        return SamplingParams(
            max_tokens=budget,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            stop=list(sampling.stop),
            stop_token_ids=[*self._end_ids, *sampling.stop_token_ids],
            ignore_eos=True,  # all end tokens are in `stop_token_ids`; vLLM's tokenizer knows only one
            include_stop_str_in_output=True,
            detokenize=bool(sampling.stop),
            logprobs=sampling.top_k if sampling.records_admitted else 0,  # beside the sampled token
            prompt_logprobs=request.prompt_top_k or None,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={MIXTURE: request.mixture} if request.mixture else None,
            skip_clone=True,  # a shallow copy is enough
        )


def cpu_refusal(config: Any) -> str | None:
    """Why a model with that configuration cannot be sampled from on a CPU; None if no reason is known."""
    text = config.get_text_config()
    if getattr(text, "kv_lora_rank", None):  # latent attention has other sizes
        return None
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if size in CPU_HEAD_SIZES:
        return None
    return (
        f"the model has attention heads of {size} values, and vLLM computes on a CPU heads of "
        f"{', '.join(map(str, CPU_HEAD_SIZES))}; set roles.rollout.engine=hf, or give the workers GPUs "
        "(roles.rollout.gpus)"
    )


def _start(spec: EngineSpec, second: SecondModel | None, adapters: Adapters | None) -> LLMEngine:
    os.environ.update(ENVIRONMENT)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # it warns that a CPU has no Triton
    if spec.gpus == 0:
        _do_not_compile()
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    arguments: dict[str, Any] = {
        "model": spec.model,
        "trust_remote_code": spec.trust_remote_code,
        "dtype": spec.dtype,
        "seed": spec.seed,
        "max_model_len": spec.max_model_len,
        "max_num_seqs": spec.max_concurrency,
        **_cache_size(spec),
        **_share_of_gpu(spec),
        "tensor_parallel_size": spec.tensor_parallel,
        "distributed_executor_backend": "uni" if spec.tensor_parallel == 1 else "mp",
        "enforce_eager": spec.gpus == 0,
        "enable_sleep_mode": spec.gpus > 0,
        "enable_prefix_caching": True,
        **_whole_prompts(spec),
        "async_scheduling": False,  # a step returns its own tokens, so weights change exactly between two tokens
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",  # requests are complete: ignore a model's generation_config.json
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        **({"hf_overrides": {"head_dtype": "float32"}} if spec.lm_head_fp32 else {}),
        **({"max_logprobs": spec.max_admitted} if spec.max_admitted else {}),
        **_mixture(second),
        **({} if adapters is None else adapters.arguments()),
    }
    set_num_threads = torch.set_num_threads
    set_num_threads(spec.threads)
    try:
        with shared_gloo_device():
            return LLMEngine.from_engine_args(EngineArgs(**{**arguments, **spec.options}))
    finally:
        torch.set_num_threads = set_num_threads  # vLLM's CPU worker disables it for the whole process


def _mixture(second: SecondModel | None) -> dict[str, Any]:
    """The second model is asked by a logits processor. It is written for the interface of the first of vLLM's two model
    runners; the other one is the default where there is Triton."""
    if second is None:
        return {}
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    return {"logits_processors": [second.processor()]}


def _cache_size(spec: EngineSpec) -> dict[str, Any]:
    """Bytes for keys and values. Nothing is said on a GPU without `kv_cache_gib`: vLLM then takes what the model leaves
    of its share of the memory."""
    size = spec.kv_cache_gib
    if size is None and spec.gpus == 0:
        size = CPU_KV_CACHE_GIB
    return {} if size is None else {"kv_cache_memory_bytes": int(size * 2**30)}


def _share_of_gpu(spec: EngineSpec) -> dict[str, Any]:
    """A colocated engine has a fraction of a GPU, unless the others sleep while it works. vLLM does not start unless
    the fraction of the GPU that it may use is free, most of it by default, even if the size of the cache is given."""
    return {"gpu_memory_utilization": spec.gpus} if 0 < spec.gpus < 1 and not spec.alone_on_gpu else {}


def _whole_prompts(spec: EngineSpec) -> dict[str, Any]:
    """On a CPU a prompt is computed in one step. With chunked prompts, vLLM rewinds the random state of a seeded
    request after each chunk, which only a GPU's generator supports: on a CPU the engine fails ("CPU Generator does not
    use offset")."""
    if spec.gpus:
        return {}
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, spec.max_model_len)}


def _do_not_compile() -> None:
    """On a CPU the first step would compile the sampler for 4 to 39 s, without a benefit."""
    import torch._dynamo

    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # for processes that vLLM starts
    torch._dynamo.config.disable = True  # for this process, in which torch has already read its environment


def _sample_id(request_id: str, index: int) -> str:
    return f"{request_id}#{index}"


def _completion(index: int, output: CompletionOutput, top_k: int) -> Completion:
    """`top_k`: how many of the likeliest tokens vLLM reports at each position, after the sampled one."""
    tokens = np.asarray(output.token_ids, dtype=np.int32)
    flat: Any = output.logprobs
    logps = np.asarray(flat.logprobs, dtype=np.float32).reshape(len(tokens), 1 + top_k)
    ids = np.asarray(flat.token_ids, dtype=np.int32).reshape(len(tokens), 1 + top_k)
    return Completion(
        index=index,
        tokens=tokens,
        logps=logps[:, 0],
        versions=_versions(len(tokens), output.weight_versions or []),
        admitted=_admitted(ids, logps) if top_k else None,
        finish=Finish(output.finish_reason),  # vLLM also uses `stop` and `length`; any other reason is an error
    )


def _of_prompt(output: RequestOutput, top_k: int) -> PromptTopK:
    """vLLM reports at each position the prompt's own token, then the likeliest; nothing at the first one. It takes no
    prefix from its cache for such a request, and computes the logits of all of a step's tokens at once."""
    flat: Any = output.prompt_logprobs
    logps = np.asarray(flat.logprobs, dtype=np.float32).reshape(-1, 1 + top_k)
    ids = np.asarray(flat.token_ids, dtype=np.int32).reshape(-1, 1 + top_k)
    return PromptTopK(ids[:, 1:], logps[:, 1:], logps[:, 0])


def _admitted(ids: np.ndarray, logps: np.ndarray) -> np.ndarray:
    """[C, k]: of the k likeliest tokens after the sampled one, those that truncation left; -1 in place of others. The
    sampled one is among them also where several are as likely as the last."""
    found = np.where(np.isfinite(logps[:, 1:]), ids[:, 1:], -1).astype(np.int32)
    missing = (found != ids[:, :1]).all(axis=1)
    found[missing, -1] = ids[missing, 0]
    return found


def _versions(count: int, spans: list[Any]) -> np.ndarray:
    """The version of each token, from vLLM's spans of versions."""
    versions = np.empty(count, dtype=np.int32)
    for span in spans:
        versions[span.start : span.end] = int(span.version)
    return versions
