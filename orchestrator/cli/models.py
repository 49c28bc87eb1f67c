"""Commands that take a model out of a run, or make one of several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.application import AsJson, app

if TYPE_CHECKING:
    from orchestrator.model_folders.export import Exported

DType = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16. Default: the type that the model has.")
]
ShardGib = Annotated[float, typer.Option("--shard-gib", help="Largest file of weights, in GiB.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code from the model's folder.")]
Base = Annotated[
    str | None, typer.Option("--base", help="Model that adapters are for, or whose differences are merged (ties).")
]


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(help="A run's folder, a checkpoint, a phase's folder, a model's or adapter's, a hub name.")
    ],
    target: Annotated[Path, typer.Argument(help="The folder to write; it must be new.")],
    step: Annotated[int | None, typer.Option("--step", help="Of a run: that checkpoint. Default: the newest.")] = None,
    phase: Annotated[str | None, typer.Option("--phase", help="Of a run: what this finished phase left.")] = None,
    role: Annotated[str | None, typer.Option("--role", help="Another trained role than the first, e.g. value.")] = None,
    averaged: Annotated[bool, typer.Option("--averaged", help="The average of the weights (train.bema).")] = False,
    adapter: Annotated[bool, typer.Option("--adapter", help="The LoRA adapters alone, not merged.")] = False,
    dtype: DType = None,
    shard_gib: ShardGib = 5.0,
    base: Base = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Write a model as a plain Hugging Face folder: weights, tokenizer, chat template, generation config."""
    from orchestrator.model_folders.export import export as export_model

    done = export_model(
        source,
        target,
        step=step,
        phase=phase,
        role=role,
        averaged=averaged,
        adapter=adapter,
        dtype=dtype,
        shard_gib=shard_gib,
        base=base,
        trust_remote_code=trust,
    )
    _show(done, as_json)


@app.command()
def merge(
    models: Annotated[
        list[str], typer.Argument(help="Models as `export` takes them; one adapter is merged into its base.")
    ],
    into: Annotated[Path, typer.Option("--into", help="The folder to write; it must be new.")],
    method: Annotated[str | None, typer.Option("--method", help="linear (the default), slerp or ties.")] = None,
    weight: Annotated[
        list[float] | None, typer.Option("--weight", help="One for each model, in their order. Default: all equal.")
    ] = None,
    t: Annotated[
        float | None, typer.Option("--t", help="slerp: how far from the first to the second. Default: 0.5.")
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="ties: share of each difference that stays. Default: 0.5.")
    ] = None,
    base: Base = None,
    dtype: DType = None,
    shard_gib: ShardGib = 5.0,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Merge adapters into their base, or several models into one."""
    from orchestrator.model_folders.merge import merge as merge_models

    done = merge_models(
        models,
        into,
        method=method,
        weights=weight,
        t=t,
        density=density,
        base=base,
        dtype=dtype,
        shard_gib=shard_gib,
        trust_remote_code=trust,
    )
    _show(done, as_json)


def _show(done: Exported, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(done.to_json()))
        return
    typer.echo(f"{done.kind}, {done.parameters:,} parameters{f' in {done.dtype}' if done.dtype else ''}")
    if done.missing:
        typer.echo(f"without {' and without '.join(done.missing)}: the source has none")
    typer.echo(str(done.folder))
