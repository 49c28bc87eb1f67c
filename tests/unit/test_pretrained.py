"""What may be loaded, and what may run while it is: folders that are no models, and models that bring code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    MambaConfig,
    Qwen2Config,
    RwkvConfig,
)

from actors.batch import Batch
from actors.errors import ConfigError, ModelError
from actors.forward import forward
from actors.model import ModelSpec, check_architecture, load_model
from actors.model_worker import ModelWorker
from actors.objective import MicroBatch
from actors.pretrained import _tokenizer_class, check_folder, load_config, load_pretrained, load_tokenizer, skeleton
from actors.specs import BackendSpec, LoraSpec
from orchestrator.config.schema import RunConfig
from orchestrator.planning.resolve import prepare, resolve_model
from rewards.worker import RewardWorker
from rollout.engine import EngineSpec, build_engine
from rollout.sampling import Request, Sampling
from rollout.stopping import StopRule, end_token_ids
from tests.unit.forward_stage import tiny_gemma2
from tests.unit.tiny import tiny_model, tiny_model_folder

CONFIGURATION = """
from pathlib import Path
from transformers import Qwen2Config

Path("{marker}").touch()

class OwnConfig(Qwen2Config):
    model_type = "own"
"""
MODEL = """
from transformers import Qwen2ForCausalLM
from .configuration_own import OwnConfig

class OwnModel(Qwen2ForCausalLM):
    config_class = OwnConfig
"""
TOKENIZER = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def with_code(tmp_path: Path) -> Path:
    """A model whose configuration, class and tokenizer are Python files beside its weights."""
    folder = tiny_model_folder(tmp_path, hidden=32).rename(tmp_path / "with_code")
    for name, text in {
        "configuration_own": CONFIGURATION,
        "modeling_own": MODEL,
        "tokenization_own": TOKENIZER,
    }.items():
        (folder / f"{name}.py").write_text(text.replace("{marker}", str(tmp_path / "ran")))
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    _change(folder / "config.json", model_type="own", architectures=["OwnModel"], auto_map=classes)
    own = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    _change(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=own)
    return folder


def _change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def spec_of(folder: Path, *, trusted: bool) -> EngineSpec:
    return EngineSpec("hf", str(folder), max_model_len=32, trust_remote_code=trusted)


LOADERS: dict[str, Callable[[Path, bool], Any]] = {
    "configuration": lambda folder, trusted: load_config(str(folder), trusted),
    "tokenizer": lambda folder, trusted: load_tokenizer(str(folder), trusted),
    "model": lambda folder, trusted: load_pretrained(str(folder), trusted),
    "model without weights": lambda folder, trusted: skeleton(str(folder), trusted),
    "engine": lambda folder, trusted: build_engine(spec_of(folder, trusted=trusted)),
    "end of a sequence": lambda folder, trusted: end_token_ids(str(_without_generation(folder)), trusted),
    "stop strings": lambda folder, trusted: StopRule(str(folder), (), trusted).finish([3], Sampling(4, stop=("1",)), 4),
    "rewards": lambda folder, trusted: RewardWorker("reward/0", [], str(folder), trust_remote_code=trusted).ready(),
    "trainer": lambda folder, trusted: _trainer(folder, trusted=trusted),
    "plan": lambda folder, trusted: prepare(_config(folder, trusted=trusted)),
}


def _without_generation(folder: Path) -> Path:
    (folder / "generation_config.json").unlink()
    return folder


def _trainer(folder: Path, *, trusted: bool) -> ModelWorker:
    made = ModelWorker("policy", ModelSpec(str(folder), trust_remote_code=trusted), BackendSpec(), threads=1)
    made.ready()
    return made


def _config(folder: Path, **model: Any) -> RunConfig:
    (rows := folder.parent / "rows.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n' * 4)
    trusted = {"trust_remote_code": model.pop("trusted")} if "trusted" in model else {}
    phase = {"method": "sft", "data": {"path": str(rows), "cache_dir": str(folder.parent / "cache")}}
    phase["train"] = {"steps": 1, "batch_size": 4}
    return RunConfig.model_validate({"model": {"path": str(folder), **trusted, **model}, "phases": {"sft": phase}})


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS.keys())
def test_code_of_a_model_is_refused_without_a_prompt_and_with_the_key(
    with_code: Path, monkeypatch: pytest.MonkeyPatch, loader: Callable[[Path, bool], Any]
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    with pytest.raises(ModelError, match=r"(?s)not run.*model\.trust_remote_code=true"):
        loader(with_code, False)
    assert not with_code.with_name("ran").exists()


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS.keys())
def test_code_that_is_trusted_runs_wherever_the_model_is_loaded(
    with_code: Path, loader: Callable[[Path, bool], Any]
) -> None:
    assert loader(with_code, True) is not None


def test_a_model_with_code_is_trained_sampled_from_and_saved_with_its_code(with_code: Path, tmp_path: Path) -> None:
    trainer = _trainer(with_code, trusted=True)
    assert type(trainer.backend.model.causal).__name__ == "OwnModel"
    engine = build_engine(spec_of(with_code, trusted=True))
    engine.load(trainer.export(dict, 1 << 20).items(), version=1)
    engine.add(Request("r", (5, 6), 1, Sampling(2), seed=0))
    while not (finished := engine.step()):
        pass
    assert finished[0].completions[0].versions.tolist() == [1, 1]
    trainer.save_model(str(tmp_path / "saved"))
    opened: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(opened).__name__ == "OwnModel"
    expected = dict(tiny_model(hidden=32).named_parameters())
    assert all(torch.equal(weight, expected[name]) for name, weight in opened.named_parameters())


ADAPTER = {"adapter_config.json": "{}", "adapter_model.safetensors": ""}
MODEL_FILES = {"config.json": "{}", "model.safetensors": ""}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"not a model folder\n  it holds: nothing"),
        ({"notes.txt": ""}, "it holds: notes.txt"),
        ({"config.json": "{}"}, "needed:   config.json and weights"),
        (ADAPTER, "holds a LoRA adapter and no model; merge it first"),
        ({**ADAPTER, "config.json": "{}"}, "holds a LoRA adapter and no model; merge it first"),
        ({**ADAPTER, **MODEL_FILES}, r"beside the weights.*move the adapter's files.*merge it first"),
    ],
)
def test_a_folder_that_is_no_model_is_refused_by_key_with_what_to_do(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for refusal in (check_folder, lambda path, key: resolve_model(path, 0, key)):
        with pytest.raises(ModelError, match=rf"(?s)roles\.reference\.model: .*{message}"):
            refusal(str(tmp_path), "roles.reference.model")


def test_a_model_folder_and_a_name_of_the_hub_pass(tmp_path: Path) -> None:
    for name, text in MODEL_FILES.items():
        (tmp_path / name).write_text(text)
    assert resolve_model(str(tmp_path), 0) == str(tmp_path)
    assert resolve_model("Qwen/Qwen2.5-0.5B", 0) == "Qwen/Qwen2.5-0.5B"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.path: there is no folder .*absent"):
        resolve_model(str(tmp_path / "absent"), 0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]), "packed documents: conv"),
        (Llama4TextConfig(num_hidden_layers=2), "packed documents: chunked_attention"),
        (MambaConfig(num_hidden_layers=2), "packed documents: linear_attention"),
        (RwkvConfig(num_hidden_layers=2), "packed documents: a state that goes from token to token"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_through_which_packed_documents_would_see_each_other_are_refused_by_the_plan(
    tmp_path: Path, config: Any, message: str
) -> None:
    folder = tiny_model_folder(tmp_path, hidden=32)
    config.save_pretrained(folder)
    with pytest.raises(ModelError, match=message):
        prepare(_config(folder))


def test_full_and_sliding_attention_pass() -> None:
    for config in (Gemma2Config(), GptOssConfig(num_hidden_layers=2), Qwen2Config()):
        check_architecture(config, "a model")


def test_adapters_that_cannot_be_attached_are_refused_by_the_plan(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path, hidden=32)
    for targets, message in {
        ".*lm_head": "output head",
        "embed_tokens": "also that of lm_head",
        "x": "model.lora",
    }.items():
        with pytest.raises(ModelError, match=message):
            prepare(_config(folder, lora={"r": 4, "target_modules": [targets] if "." not in targets else targets}))
    assert prepare(_config(folder, lora={"r": 4})).lora == LoraSpec(r=4)


@pytest.mark.parametrize(
    ("hidden", "rollout", "refused"),
    [(64, {}, True), (128, {}, False), (64, {"engine": "hf"}, False), (64, {"gpus": 1.0}, False)],
)
def test_head_sizes_that_vllm_does_not_compute_on_a_cpu_are_refused_by_the_plan(
    tmp_path: Path, hidden: int, rollout: dict[str, Any], refused: bool
) -> None:
    folder = tiny_model_folder(tmp_path, hidden=hidden)  # of four heads
    sampling = {"data": {"path": str(tmp_path / "rows.jsonl")}, "max_tokens": 4}
    config = _config(folder).model_dump()
    config["phases"]["sft"]["evaluation"] = sampling
    config |= {"roles": {"rollout": rollout}, "rewards": [{"fn": "tests.unit.test_pretrained:nothing"}]}
    settings = RunConfig.model_validate(config)
    if refused:
        with pytest.raises(ConfigError, match=r"engine=vllm: .*heads of 16 values.*32, 64.*roles\.rollout\.engine=hf"):
            prepare(settings)
    else:
        assert prepare(settings).generates


def nothing(completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def test_the_hf_engine_samples_from_the_capped_model_that_is_trained(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    tiny_gemma2().save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    engine = build_engine(spec_of(folder, trusted=False))
    engine.add(Request("r", (5, 6, 7), 1, Sampling(8), seed=0))
    while not (finished := engine.step()):
        pass
    (completion,) = finished[0].completions
    tokens = np.concatenate([[5, 6, 7], completion.tokens]).astype(np.int32)
    micro = MicroBatch.of(Batch.build([len(tokens)], tokens=tokens))
    with torch.no_grad():
        trained = forward(load_model(ModelSpec(str(folder)), trainable=False), micro).logps[3:]
    np.testing.assert_allclose(completion.logps, trained, atol=1e-4)


def test_a_process_that_only_decodes_imports_no_torch_and_has_the_tokenizer_that_auto_tokenizer_finds(
    tmp_path: Path,
) -> None:
    folder = tiny_model_folder(tmp_path)
    code = (
        "import sys\nfrom actors.pretrained import load_tokenizer\n"
        f"tokenizer = load_tokenizer({str(folder)!r}, False)\n"
        "print(type(tokenizer).__name__, tokenizer.decode([5, 9, 14]), 'torch' in sys.modules)"
    )
    assert _tokenizer_class(folder) is not None, (
        "the packages of transformers are laid out otherwise than `_tokenizer_class` expects: it finds no class, and "
        "every process that only decodes text imports torch"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    auto = AutoTokenizer.from_pretrained(str(folder))
    assert done.stdout.split() == [type(auto).__name__, auto.decode([5, 9, 14]), "False"], done.stderr
    ours, text = load_tokenizer(str(folder), False), "12+34=46 and so on"
    assert type(ours) is type(auto) and ours.get_vocab() == auto.get_vocab() and ours(text) == auto(text)


@pytest.mark.parametrize("changed", ["tokenizer_class", "model_type"])
def test_a_tokenizer_of_another_type_of_model_is_the_one_that_auto_tokenizer_finds(
    tmp_path: Path, changed: str
) -> None:
    folder = tiny_model_folder(tmp_path)
    file = folder / ("config.json" if changed == "model_type" else "tokenizer_config.json")
    other = {"tokenizer_class": "PreTrainedTokenizerFast", "model_type": "llama"}[changed]
    file.write_text(json.dumps({**json.loads(file.read_text()), changed: other}))
    ours, auto = load_tokenizer(str(folder), False), AutoTokenizer.from_pretrained(str(folder))
    assert type(ours) is type(auto) and ours("1+1=2") == auto("1+1=2")


def test_a_configuration_is_read_without_the_code_of_models_which_can_be_imported_afterwards(tmp_path: Path) -> None:
    folder, models = str(tiny_model_folder(tmp_path)), "transformers.models.auto.modeling_auto"
    code = (
        "import sys\n"
        "from actors.pretrained import load_config, skeleton\n"
        f"print(load_config({folder!r}, False).model_type, {models!r} in sys.modules)\n"
        f"print(type(skeleton({folder!r}, False)).__name__, {models!r} in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.split() == ["qwen2", "False", "Qwen2ForCausalLM", "True"]
