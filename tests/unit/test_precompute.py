"""What is computed once for a whole data set: what it depends on, what is kept of it, and when it is refused."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from actors.batch import Batch
from actors.errors import ConfigError, DataError, ModelError
from orchestrator.collection.precompute import weights_fingerprint
from orchestrator.config.schema import RunConfig
from orchestrator.data import caches as kept
from orchestrator.data.caches import Origin
from orchestrator.data.source import RowSource
from orchestrator.methods import build
from orchestrator.pipeline import Labelled, Pairs, Pipeline, Prompts, generate, infer
from orchestrator.planning.bundles import ClusterView
from orchestrator.planning.plan import Plan, draft_plan
from orchestrator.planning.prepared import Prepared
from orchestrator.planning.resolve import prepare
from orchestrator.reporting.plan_report import render
from tests.unit.source_stub import opened, write_rows
from tests.unit.tiny import tiny_model_folder

ORIGIN = Origin("ref_logps", "data", "weights", "float32", 1.0)
ONCE = {"precompute_ref_log_probs": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"), hidden=32)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    made = ({"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(10 * i)} for i in range(2, 22))
    return write_rows(tmp_path / "pairs.jsonl", made)


def source(path: Path, **data: Any) -> RowSource:
    found = opened(path, Pairs, **data)
    assert isinstance(found, RowSource)
    return found


# What the values depend on


@pytest.mark.parametrize(
    "other",
    [{"data": "others"}, {"weights": "others"}, {"dtype": "bfloat16"}, {"temperature": 0.7}, {"column": "old_logps"}],
    ids=lambda other: next(iter(other)),
)
def test_every_change_of_the_values_changes_the_folder(other: dict[str, Any], tmp_path: Path) -> None:
    assert replace(ORIGIN, **other).folder(tmp_path) != ORIGIN.folder(tmp_path)
    assert replace(ORIGIN).folder(tmp_path) == ORIGIN.folder(tmp_path)


@pytest.mark.parametrize(
    "data", [{"limit": 19}, {"max_length": 6}, {"append_eos": False}, {"completion_only": False}], ids=str
)
def test_every_change_of_tokens_or_mask_changes_the_fingerprint(data: dict[str, Any], rows: Path) -> None:
    assert source(rows, **data).fingerprint != source(rows).fingerprint


def test_the_order_of_drawing_does_not_change_the_fingerprint(rows: Path) -> None:
    assert source(rows, shuffle=True).fingerprint == source(rows).fingerprint


def test_any_byte_of_weights_or_configuration_changes_the_fingerprint(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    fingerprint = weights_fingerprint(str(copy))
    assert fingerprint == weights_fingerprint(str(model))
    for name in ("model.safetensors", "config.json"):
        before = (copy / name).read_bytes()
        (copy / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert weights_fingerprint(str(copy)) != fingerprint
        (copy / name).write_bytes(before)
    (copy / "tokenizer_config.json").write_text("{}")
    assert weights_fingerprint(str(copy)) == fingerprint


def test_a_folder_without_weights_has_no_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither \*.safetensors nor \*.bin"):
        weights_fingerprint(str(tmp_path))


def test_a_model_of_the_hub_is_known_by_its_revision(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, cached = "0123456789abcdef" * 2 + "01234567", tmp_path / "models--some--model"
    shutil.copytree(model, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    # As HF_HUB_CACHE and HF_HUB_OFFLINE, which are read when the hub's library is imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert weights_fingerprint("some/model") == f"some/model@{commit}"
    with pytest.raises(OSError, match="in the cached files"):
        weights_fingerprint("another/model")


# What is kept


def test_values_that_were_written_completely_are_found_again(tmp_path: Path) -> None:
    folder = ORIGIN.folder(tmp_path)
    assert kept.load(folder, 4) is None
    assert not kept.any_of(tmp_path, "ref_logps", "data")
    with kept.writing(folder, ORIGIN, 4) as values:
        values[:] = [0, 1, 2, 3]
    found = kept.load(folder, 4)
    assert found is not None
    assert found.tolist() == [0, 1, 2, 3]
    assert kept.any_of(tmp_path, "ref_logps", "data")


def test_a_pass_that_fails_stores_nothing(tmp_path: Path) -> None:
    folder = ORIGIN.folder(tmp_path)
    with pytest.raises(RuntimeError, match="died"), kept.writing(folder, ORIGIN, 4):
        raise RuntimeError("it died")
    assert list(folder.parent.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"not an array"], ids=["cut off", "another file"])
def test_a_damaged_file_is_named_with_what_to_do(damage: bytes, tmp_path: Path) -> None:
    folder = ORIGIN.folder(tmp_path)
    with kept.writing(folder, ORIGIN, 4):
        pass
    (folder / kept.VALUES).write_bytes(damage)
    with pytest.raises(DataError, match=f"damaged.*delete {folder}"):
        kept.load(folder, 4)


def test_values_of_another_number_of_tokens_are_refused(tmp_path: Path) -> None:
    with kept.writing(ORIGIN.folder(tmp_path), ORIGIN, 4):
        pass
    with pytest.raises(DataError, match="for 5 tokens; delete"):
        kept.load(ORIGIN.folder(tmp_path), 5)


# How rows get their values


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), tokens=st.integers(1, 60))
def test_the_parts_are_the_whole_data_set_in_order_and_no_longer_than_asked(
    lengths: list[int], tokens: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made = ({"prompt": "a", "chosen": "b" * length, "rejected": "c"} for length in lengths)
    data = source(write_rows(tmp_path_factory.mktemp("rows") / "pairs.jsonl", made))
    parts = list(data.parts(tokens))
    whole = Batch.concat([data.item(index).batch for index in range(len(data))])
    assert [span.start for span, _ in parts] == [0, *(span.stop for span, _ in parts[:-1])]
    assert parts[-1][0].stop == data.num_tokens == whole.num_tokens
    assert np.concatenate([batch["tokens"] for _, batch in parts]).tolist() == whole["tokens"].tolist()
    assert np.concatenate([batch["mask"] for _, batch in parts]).tolist() == whole["mask"].tolist()
    assert np.concatenate([batch.lengths for _, batch in parts]).tolist() == whole.lengths.tolist()
    assert all(batch.num_tokens <= tokens or len(batch) == 2 for _, batch in parts)


def test_each_row_of_a_batch_has_its_own_part_of_a_column_in_every_epoch(rows: Path) -> None:
    plain = source(rows, shuffle=True)
    values = np.arange(plain.num_tokens, dtype=np.float32)
    given = plain.with_column("ref_logps", values, "a note")
    assert given.report.notes[-1] == "a note"
    spans = {index: span for index, (span, _) in enumerate(plain.parts(1))}
    positions = list(range(15, 25))  # across the end of the first epoch
    batch = given.batch(positions)
    expected = np.concatenate([values[spans[plain.order.at(position)[1]]] for position in positions])
    assert batch["ref_logps"].tolist() == expected.tolist()
    assert batch["tokens"].tolist() == plain.batch(positions)["tokens"].tolist()


# Pipelines and plans


@pytest.mark.parametrize(
    ("method", "options"), [("dpo", {}), ("bco", {}), ("kto", {"loss_type": "apo_zero_unpaired"})], ids=str
)
def test_a_precomputed_stage_is_no_part_of_a_step_and_goes_once_its_column_is_given(
    method: str, options: dict[str, Any]
) -> None:
    pipeline = build(method, {**options, **ONCE})
    (stage,) = pipeline.precomputed
    assert (stage.name, pipeline.batch_stages) == ("reference.infer", ())
    given = pipeline.without_stage(stage)
    assert given.roles == ("policy",)
    assert given.precomputed == given.collect == ()
    assert "ref_logps" in given.data.columns
    assert build(method, options).precomputed == ()


REFUSED: dict[str, tuple[Any, str]] = {
    "rows of a batch": (lambda: build("kto", ONCE), "made anew of each batch"),
    "weights that move": (
        lambda: Pipeline(Labelled, infer("policy", into="old_logps", precomputed=True), *build("sft", {}).updates),
        "the weights of policy change in every step",
    ),
    "prompts": (
        lambda: Pipeline(Prompts, generate(n=2), infer("reference", into="ref_logps", precomputed=True)),
        "no rows before they are answered",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_values_that_are_not_fixed_for_the_whole_phase_cannot_be_precomputed(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ConfigError, match=rf"precompute_ref_log_probs: .*{message}.*leave it out"):
        make()


def test_a_stream_is_refused() -> None:
    phase = {"method": "dpo", "options": ONCE, "data": {"path": "pairs.jsonl", "streaming": True}}
    config = RunConfig.model_validate({"phases": {"dpo": phase}})
    (refusal,) = draft_plan(config, {"dpo": build("dpo", ONCE)}).refusals
    assert "phases.dpo.options.precompute_ref_log_probs: a stream has no end" in refusal


# What is known before anything is launched


def run_of(
    rows: Path,
    model: Path,
    *,
    phases: int = 1,
    lora: int | None = None,
    options: dict[str, Any] = ONCE,
    steps: int = 1,
    **keys: Any,
) -> RunConfig:
    """Phases of DPO with a cache beside the data; `lora`: the rank of adapters."""
    data = {"path": str(rows), "cache_dir": str(rows.parent / "cache")}
    phase = {"method": "dpo", "options": options, "data": data, "train": {"steps": steps, "batch_size": 4}}
    named = {f"phase{index}": phase for index in range(phases)}
    adapters = {"lora": {"r": lora}} if lora else {}
    return RunConfig.model_validate({"model": {"path": str(model), **adapters}, "phases": named, **keys})


def keep(prepared: Prepared, model: Path, *, phase: int = 0, dtype: str = "float32") -> None:
    """What a run leaves: made-up values for a phase's data under these weights."""
    found = prepared.phases[phase]
    assert isinstance(found.source, RowSource)
    origin = Origin("ref_logps", found.source.fingerprint, weights_fingerprint(str(model)), dtype, 1.0)
    root = found.config.data.cache_dir
    assert root is not None
    with kept.writing(origin.folder(root), origin, found.source.num_tokens) as values:
        values[:] = -1.5


def roles_of(config: RunConfig) -> list[str]:
    return list(prepare(config).plan().accepted().roles)


def test_a_reference_is_planned_unless_its_values_are_kept(rows: Path, model: Path) -> None:
    config = run_of(rows, model)
    assert roles_of(config) == ["policy", "reference"]
    keep(prepare(config), model)
    assert roles_of(config) == ["policy"]
    sized = run_of(rows, model, roles={"reference": {"cpus": 0.5}})
    assert prepare(sized).plan().warnings == prepare(config).plan().warnings, "its keys are not called ineffective"
    unused = sized.model_copy(update={"phases": run_of(rows, model, options={"loss_type": "sft"}).phases})
    assert "roles.reference.cpus=0.5: nothing" in "".join(prepare(unused).plan().warnings)
    found = prepare(config).phases[0]
    assert (found.source.batch([0, 1])["ref_logps"] == -1.5).all()
    assert "from the cache" in found.source.report.notes[-1]


@pytest.mark.parametrize(
    ("options", "steps", "once"),
    [
        ({}, 5, False),  # 20 pairs
        ({}, 6, True),
        ({"precompute_ref_log_probs": False}, 6, False),
        ({"sync_ref_model": True, "ref_model_sync_steps": 2}, 6, False),
        ({"loss_type": "sft"}, 6, False),  # without a reference
    ],
)
def test_a_reference_passes_over_the_data_once_if_the_phase_does_so_more_often_and_its_weights_stay(
    options: dict[str, Any], steps: int, once: bool, rows: Path, model: Path
) -> None:
    pipeline = prepare(run_of(rows, model, options=options, steps=steps)).phases[0].pipeline
    assert [stage.role for stage in pipeline.precomputed] == ["reference"] * once
    inferred = [stage for stage in pipeline if stage.name == "reference.infer"]
    assert len(inferred) == (options != {"loss_type": "sft"})


def other_model(tmp_path: Path) -> dict[str, Any]:
    return {"roles": {"reference": {"model": str(tiny_model_folder(tmp_path, hidden=32, seed=5))}}}


@pytest.mark.parametrize("change", ["weights", "dtype"])
def test_values_of_other_weights_or_another_dtype_are_not_taken(
    change: str, rows: Path, model: Path, tmp_path: Path
) -> None:
    config = run_of(rows, model)
    keep(prepare(config), model)
    other = other_model(tmp_path) if change == "weights" else {"roles": {"reference": {"dtype": "bfloat16"}}}
    assert roles_of(run_of(rows, model, **other)) == ["policy", "reference"]


def test_a_later_phase_starts_from_what_is_not_known_yet_unless_its_reference_is(
    rows: Path, model: Path, tmp_path: Path
) -> None:
    config = run_of(rows, model, phases=2)
    keep(prepare(config), model)
    first, second = prepare(config).phases
    assert (first.pipeline.precomputed, len(second.pipeline.precomputed)) == ((), 1)
    assert roles_of(config) == ["policy", "reference"]
    own = run_of(rows, model, phases=2, roles={"reference": {"model": str(model)}})
    assert roles_of(own) == ["policy"]
    adapted = run_of(rows, model, phases=2, lora=2)
    assert [phase.pipeline.precomputed for phase in prepare(adapted).phases] == [(), ()]


def shown(plan: Plan) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(render(plan, ClusterView.of_machine(cpus=8)))
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_the_plan_names_the_roles_that_end_after_the_pass(rows: Path, model: Path) -> None:
    config = run_of(rows, model)
    once, always = build("dpo", ONCE), build("dpo", {})
    assert draft_plan(config, {"phase0": once}).precompute_only == ("reference",)
    assert draft_plan(config, {"phase0": always}).precompute_only == ()
    said = shown(draft_plan(config, {"phase0": once}))
    assert "once, before the first step" in said
    assert "reference: passes over the data once, then its processes end" in said
    (stage,) = once.precomputed
    said = shown(draft_plan(config, {"phase0": once.without_stage(stage)}))
    assert "phase phase0: dpo on pairs with ref_logps" in said
    assert "reference" not in said
    both = run_of(rows, model, phases=2)
    assert draft_plan(both, {"phase0": once, "phase1": always}).precompute_only == ()
