"""Models found in runs and folders, exported as plain Hugging Face folders, and merged."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors import lora
from actors.errors import ConfigError, ModelError
from actors.saved_state import Seal
from actors.specs import LoraSpec
from orchestrator.checkpoint import Checkpoint, CheckpointStore, RunState
from orchestrator.model_folders.export import export
from orchestrator.model_folders.found import Wanted, find_model
from orchestrator.model_folders.merge import merge
from tests.unit.tiny import tiny_model_folder, tiny_tokenizer

LAYER = "model.layers.0.mlp.up_proj.weight"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def written_checkpoint(run: Path, model: Path, *, step: int, phase: str = "sft", keep: int = 9) -> Checkpoint:
    """With `model/`, a critic's model in `models/value`, and the state of both."""

    async def write(folder: Path) -> dict[str, Seal]:
        for name in ("model", "models/value"):
            shutil.copytree(model, folder / name)
        for role in ("policy", "value"):
            (folder / role).mkdir()
            (folder / role / "state.pt").write_bytes(b"0")
        return {}

    state = RunState(phase, 0, step, step, step, {}, {}, "data")
    return asyncio.run(CheckpointStore(run / "checkpoints", keep=keep).write(write, state))


def adapter_folder(base: Path, target: Path, *, seed: int) -> Path:
    """An adapter of the base, of numbers that are not zero."""
    causal = AutoModelForCausalLM.from_pretrained(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lora.attach(causal, LoraSpec(r=2))
        for name, parameter in causal.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    lora.write_adapter(causal, target, lora.adapter_weights(causal))
    return target


def test_a_run_stands_for_its_newest_intact_checkpoint(tmp_path: Path):
    model = tiny_model_folder(tmp_path)
    for step in (1, 2, 3):
        written_checkpoint(tmp_path / "run", model, step=step)
    newest = tmp_path / "run/checkpoints/step-00000003"
    assert find_model(str(tmp_path / "run")).path == newest / "model"
    (newest / "policy/state.pt").write_bytes(b"1")
    with pytest.warns(UserWarning, match="passed over"):
        assert find_model(str(tmp_path / "run")).path.parent.name == "step-00000002"
    with pytest.raises(ConfigError, match="not what the manifest says"):
        find_model(str(newest))
    assert find_model(str(tmp_path / "run"), Wanted(step=1)).path.parent.name == "step-00000001"


def test_what_a_run_does_not_have_is_refused_with_what_it_has(tmp_path: Path):
    model = tiny_model_folder(tmp_path)
    checkpoint = written_checkpoint(tmp_path / "run", model, step=4).path
    assert find_model(str(checkpoint), Wanted(role="value")).path == checkpoint / "models/value"
    assert find_model(str(checkpoint), Wanted(role="policy")).path == checkpoint / "model"
    with pytest.raises(ConfigError, match="no models/judge/, which --role judge asks for; it has: model, models/value"):
        find_model(str(checkpoint), Wanted(role="judge"))
    with pytest.raises(ConfigError, match="has no adapter/, which --adapter asks for"):
        find_model(str(checkpoint), Wanted(adapter=True))
    with pytest.raises(ConfigError, match="no model of a phase 'grpo'; there are: sft"):
        find_model(str(tmp_path / "run"), Wanted(phase="grpo"))
    with pytest.raises(ConfigError, match="no checkpoint of step 7; there are: 4"):
        find_model(str(tmp_path / "run"), Wanted(step=7))
    with pytest.raises(ConfigError, match="--averaged chooses among the models of a run"):
        find_model(str(model), Wanted(averaged=True))


def test_a_finished_phase_is_found_by_its_name(tmp_path: Path):
    model = tiny_model_folder(tmp_path)
    written_checkpoint(tmp_path / "run", model, step=4, phase="dpo")
    shutil.copytree(model, tmp_path / "run/phases/sft/model")
    assert find_model(str(tmp_path / "run"), Wanted(phase="sft")).path == tmp_path / "run/phases/sft/model"
    assert find_model(str(tmp_path / "run/phases/sft")).path == tmp_path / "run/phases/sft/model"
    assert find_model(str(tmp_path / "run"), Wanted(phase="dpo")).path.parent.name == "step-00000004"


def test_an_export_in_shards_and_another_type_loads_as_the_rounded_model(tmp_path: Path):
    source = tiny_model_folder(tmp_path)
    done = export(str(source), tmp_path / "out", dtype="bfloat16", shard_gib=2e-5)
    assert len(done.files) > 2
    assert (done.dtype, done.missing) == ("bfloat16", ("chat template",))
    before, after = weights(source), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.eos_token_id == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("1+2").input_ids == tiny_tokenizer()("1+2").input_ids


def test_an_export_keeps_what_is_held_in_another_type_on_purpose(tmp_path: Path):
    source = tiny_model_folder(tmp_path)
    held = {name: tensor.bfloat16() for name, tensor in weights(source).items()}
    held["model.norm.weight"] = held["model.norm.weight"].float()
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    export(str(source), tmp_path / "out", dtype="float16")
    types = {name: tensor.dtype for name, tensor in weights(tmp_path / "out").items()}
    assert types.pop("model.norm.weight") == torch.float32
    assert set(types.values()) == {torch.float16}


def test_an_export_takes_template_and_own_code_along_and_no_second_copy_of_the_weights(tmp_path: Path):
    source = tiny_model_folder(tmp_path)
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (source / "modeling_own.py").write_text("")
    (source / "optimizer.pt").write_bytes(b"0")
    (source / "generation_config.json").unlink()
    assert export(str(source), tmp_path / "out").missing == ()
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"chat_template.jinja", "modeling_own.py", "generation_config.json", "tokenizer.json"} <= names
    assert "optimizer.pt" not in names
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (1, 0)


def test_a_refused_export_leaves_nothing_behind(tmp_path: Path):
    source = tiny_model_folder(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export(str(source), tmp_path / "full")
    with pytest.raises(ConfigError, match="--dtype float8: it must be one of float32, bfloat16, float16"):
        export(str(source), tmp_path / "out", dtype="float8")
    with pytest.raises(ModelError, match="there is no folder"):
        export(str(tmp_path / "nowhere"), tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_adapter_is_exported_merged_into_its_base_or_alone(tmp_path: Path):
    base = tiny_model_folder(tmp_path)
    adapter = adapter_folder(base, tmp_path / "adapter", seed=1)
    done = export(str(adapter), tmp_path / "whole")
    assert done.kind == "Qwen2ForCausalLM"
    before, after, parts = weights(base), weights(tmp_path / "whole"), weights(adapter)
    prefix = "base_model.model." + LAYER.removesuffix(".weight")
    scale = LoraSpec.alpha / 2
    moved = scale * parts[f"{prefix}.lora_B.weight"] @ parts[f"{prefix}.lora_A.weight"]
    assert moved.abs().max() > 0.01
    torch.testing.assert_close(after[LAYER], before[LAYER] + moved)
    assert AutoTokenizer.from_pretrained(tmp_path / "whole")("7").input_ids == tiny_tokenizer()("7").input_ids
    alone = export(str(adapter), tmp_path / "alone", adapter=True)
    assert (alone.kind, alone.missing) == ("PEFT LORA", ("tokenizer",))
    assert weights(tmp_path / "alone").keys() == parts.keys()


def test_an_adapter_of_another_model_is_refused(tmp_path: Path):
    adapter = adapter_folder(tiny_model_folder(tmp_path, layers=2), tmp_path / "adapter", seed=1)
    shallower = tiny_model_folder(tmp_path, layers=1)
    with pytest.raises(ModelError, match="do not belong together: 14 of 28"):
        merge([str(adapter)], tmp_path / "out", base=str(shallower))
    wider = tiny_model_folder(tmp_path, hidden=32)
    with pytest.raises(ModelError, match="does not fit"):
        merge([str(adapter)], tmp_path / "out", base=str(wider))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "dare"}, "--method dare: it must be one of linear, slerp, ties"),
        ({"t": 0.5}, "--t is not for --method linear, which takes --weight"),
        ({"method": "slerp", "weights": [1, 1]}, "--weight is not for --method slerp, which takes --t"),
        ({"weights": [1]}, "--weight is given 1 times for 2 models"),
        ({"weights": [1, -1]}, "--weight 1 -1: they add up to 0"),
        ({"method": "ties"}, "--method ties merges differences from a base"),
        ({"method": "ties", "base": "b", "density": 1.5}, "--density 1.5 must be between 0 and 1"),
    ],
)
def test_options_that_do_not_fit_the_merge_are_refused(tmp_path: Path, options: dict[str, object], said: str):
    with pytest.raises(ConfigError, match=said):
        merge(["one", "two"], tmp_path / "out", **options)


def test_one_whole_model_is_nothing_to_merge(tmp_path: Path):
    model = str(tiny_model_folder(tmp_path))
    with pytest.raises(ConfigError, match="is a whole model and the only one"):
        merge([model], tmp_path / "out")
    with pytest.raises(ConfigError, match="--t is for several models"):
        merge([model], tmp_path / "out", t=0.5)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Two models, and one that they could both be trained from."""
    pytest.importorskip("mergekit", reason="mergekit is an optional dependency: troupe[merge]")
    one, other, base = (tiny_model_folder(tmp_path, seed=seed) for seed in (1, 2, 3))
    return one, other, base


def test_linear_is_the_weighted_mean(tmp_path: Path, two: tuple[Path, Path, Path]):
    one, other, _ = two
    done = merge([str(one), str(other)], tmp_path / "out", weights=[3, 1])
    first, second, merged = weights(one), weights(other), weights(tmp_path / "out")
    assert done.missing == ("chat template",)
    assert merged.keys() == first.keys()
    for name in merged:
        torch.testing.assert_close(merged[name], 0.75 * first[name] + 0.25 * second[name])
    assert not torch.equal(merged[LAYER], first[LAYER])


def test_slerp_turns_each_tensor_towards_that_of_the_second_model(tmp_path: Path, two: tuple[Path, Path, Path]):
    one, other, _ = two
    merge([str(one), str(other)], tmp_path / "out", method="slerp", t=0.25)
    first, second, merged = weights(one)[LAYER], weights(other)[LAYER], weights(tmp_path / "out")[LAYER]
    angle = torch.acos(torch.cosine_similarity(first.flatten(), second.flatten(), dim=0))
    expected = (torch.sin(0.75 * angle) * first + torch.sin(0.25 * angle) * second) / torch.sin(angle)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(merged, 0.75 * first + 0.25 * second, atol=1e-3)


def test_ties_keeps_the_largest_differences_whose_sign_was_elected(tmp_path: Path, two: tuple[Path, Path, Path]):
    one, other, base = two
    merge([str(one), str(other)], tmp_path / "out", method="ties", density=0.5, base=str(base))
    start, merged = weights(base)[LAYER], weights(tmp_path / "out")[LAYER]
    kept = []
    for model in (one, other):
        moved = weights(model)[LAYER] - start
        least = moved.abs().flatten().topk(moved.numel() // 2).values.min()
        kept.append(torch.where(moved.abs() >= least, moved, 0))
    sign = torch.sign(sum(kept))
    agreeing = [torch.where(torch.sign(each) == sign, each, 0) for each in kept]
    count = sum((each != 0).float() for each in agreeing)
    torch.testing.assert_close(merged, start + sum(agreeing) / count.clamp(min=1), rtol=1e-4, atol=1e-5)
    assert (count == 2).any() and (count == 0).any()


def test_adapters_are_merged_as_the_models_that_they_make(tmp_path: Path, two: tuple[Path, Path, Path]):
    base = two[2]
    adapters = [adapter_folder(base, tmp_path / f"adapter-{seed}", seed=seed) for seed in (1, 2)]
    merge([str(adapter) for adapter in adapters], tmp_path / "out")
    whole = []
    for number, adapter in enumerate(adapters):
        export(str(adapter), tmp_path / f"whole-{number}")
        whole.append(weights(tmp_path / f"whole-{number}")[LAYER])
    torch.testing.assert_close(weights(tmp_path / "out")[LAYER], (whole[0] + whole[1]) / 2)
    assert not torch.allclose(whole[0], whole[1])


def test_models_of_different_shapes_or_vocabularies_are_not_merged(tmp_path: Path, two: tuple[Path, Path, Path]):
    one = two[0]
    with pytest.raises(ModelError, match="of their weights differ in name or shape"):
        merge([str(one), str(tiny_model_folder(tmp_path, layers=1))], tmp_path / "out")
    other = tmp_path / "other"
    shutil.copytree(two[1], other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="2 tokens of their vocabularies differ, e\\.g\\. '1' is"):
        merge([str(one), str(other)], tmp_path / "out")
