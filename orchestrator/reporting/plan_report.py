"""A plan as `troupe plan` prints it: stages, batch arithmetic, roles, memory, placement, and errors."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from actors.columns import COLUMNS
from orchestrator.pipeline import items_of
from orchestrator.planning.bundles import ClusterView, Node, describe, fit, how_many_fit
from orchestrator.planning.memory_estimate import Memory
from orchestrator.planning.plan import PhasePlan, Plan, RolePlan, problems
from orchestrator.reporting.terminal_tables import Rows

REPORT_WIDTH = 120  # columns of the text in `as_data`


def render(plan: Plan, cluster: ClusterView) -> RenderableType:
    """Everything about a plan on one screen, compared with a cluster."""
    return Group(*_parts(plan, cluster))


def as_data(plan: Plan, cluster: ClusterView, data: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The same for programs. `data`: phase -> what was found in its data set."""
    text = io.StringIO()
    Console(file=text, width=REPORT_WIDTH, highlight=False).print(render(plan, cluster))
    refused = problems(plan, cluster)
    return {
        "accepted": not refused,
        "problems": refused,
        "warnings": list(plan.warnings),
        "roles": [_role_data(role) for role in plan.roles.values()],
        "phases": [
            {
                "name": phase.name,
                "method": phase.method,
                "data": _data(phase),
                "stages": [stage.name for stage in phase.pipeline],
                "rows_per_step": phase.rows_per_step,
                "arithmetic": arithmetic(phase),
                "rows": list(data[phase.name]),
            }
            for phase in plan.phases
        ],
        "bundles": [asdict(bundle) for bundle in plan.bundles],
        "report": text.getvalue(),
    }


def _role_data(role: RolePlan) -> dict[str, Any]:
    memory = None if role.memory is None else round(role.memory.total, 3)
    return {
        "name": role.name,
        "processes": role.count,
        "resources": dict(role.resources),
        "threads": role.threads,
        "memory_gib": memory,
        "elastic": role.elastic,
        "autoscale": None if role.autoscale is None else role.autoscale.model_dump(),
    }


def _parts(plan: Plan, cluster: ClusterView) -> Iterator[RenderableType]:
    for phase in plan.phases:
        yield _heading(f"phase {phase.name}: {phase.method} on {_data(phase)}")
        yield _stages(phase)
        yield Text("\n".join([arithmetic(phase), *_particulars(phase)]) + "\n")
    yield _heading("roles")
    yield _roles(plan)
    for role, other in plan.stand_ins.items():
        yield Text(f"{role}: the {other} without its adapters; nothing is launched for it")
    for role, which in plan.engine_notes.items():
        yield Text(f"{role}: {which}")
    for roles in plan.turns:
        yield Text(_turns(plan, roles))
    for role, why in plan.merged_because.items():
        gets = "the adapters alone" if why is None else f"weights with the adapters merged in: {why}"
        yield Text(f"{role}: is sent {gets}")
    for role in plan.precompute_only:
        yield Text(f"{role}: passes over the data once, then its processes end; what they reserve stays reserved")
    yield _heading(f"\nplacement on {cluster}")
    yield _placement(plan, cluster)
    for line in _room(plan, cluster):
        yield Text(line)
    for warning in plan.warnings:
        yield Text(f"\nwarning: {warning}", "yellow")
    refused = problems(plan, cluster)
    yield Text("\nrefused:" if refused else "\nnothing would be refused", "bold red" if refused else "green")
    for problem in refused:
        yield Text(f"  {problem}", "red")


def arithmetic(phase: PhasePlan) -> str:
    """`32 prompts x 8 samples = 256 rows a step, ...`."""
    items = items_of(phase.pipeline.data)
    samples = phase.pipeline.samples_per_prompt
    product = f"{phase.items_per_step} {items}"
    if samples and samples != phase.rows_per_item:
        product += f" x {samples} samples, regrouped to {phase.rows_per_item} rows each = {phase.rows_per_step} rows"
    elif phase.rows_per_item > 1:
        product += f" x {phase.rows_per_item} {'samples' if samples else 'rows'} = {phase.rows_per_step} rows"
    said = [f"a batch is {product}"]
    if phase.optimizer_steps_per_batch > 1:
        said.append(f"{phase.optimizer_steps_per_batch} optimizer steps on each")
    if phase.micro_batches is not None:
        said.append(
            f"at most {phase.micro_batches} micro-batches per rank, for rows of up to {phase.longest_row} tokens"
        )
    if phase.groups_in_flight:
        said.append(f"up to {phase.groups_in_flight} prompts in flight")
    return "; ".join(said)


def _particulars(phase: PhasePlan) -> Iterator[str]:
    """Choices of the plan, and changes of weights other than by training."""
    if phase.budget_note is not None:
        yield f"train.token_budget: {phase.micro_batch_tokens}, {phase.budget_note}"
    for role, companion in phase.pipeline.companions.items():
        yield f"{companion}: a frozen model in each rank of {role}"
    for stage in phase.pipeline:
        if stage.top_k is not None:
            yield f"{stage.role}: {stage.top_k} most likely tokens a position, {8 * stage.top_k + 4} bytes a token"
    for stage in phase.pipeline.mixes:
        share, source, every = (stage.options[name] for name in ("share", "source", "every"))
        yield f"{stage.role}: after every {every} steps {share:g} {source} + {1 - share:g} {stage.role}"
    if phase.pipeline.written_columns:
        yield f"data set: {', '.join(phase.pipeline.written_columns)}; a Parquet file a step"
    if phase.bema is not None:
        first = phase.bema.update_after + phase.bema.update_freq
        yield f"bema: an average every {phase.bema.update_freq} optimizer steps, first at step {first}; saved as bema/"


def _stages(phase: PhasePlan) -> Rows:
    rows = Rows("stage", "reads", "writes", "part")
    learning = len(phase.pipeline.collect)
    for index, stage in enumerate(phase.pipeline):
        part = "once, before the first step" if stage.precomputed else "learn" if index >= learning else "collect"
        first, last = stage.share
        if last - first < 1:
            part += f", for {last - first:.0%} of the prompts"
        rows.add(stage.name, ", ".join(sorted(stage.reads)), ", ".join(sorted(stage.writes)), part)
    return rows


def _data(phase: PhasePlan) -> str:
    """The kind of data, with precomputed columns."""
    data = phase.pipeline.data
    known = sorted(name for name in data.columns if "source" not in COLUMNS[name].writer)
    return f"{data.name} with {', '.join(known)}" if known else data.name


def _roles(plan: Plan) -> Rows:
    rows = Rows("role", "processes", "each reserves", "threads", "GiB each, about", "of that", "bundles")
    for role in plan.roles.values():
        total, parts = ("?", "the model's size is not known") if role.memory is None else _memory(role.memory)
        reserved = describe(role.resources)
        rows.add(role.name, _processes(role), reserved, str(role.threads), total, parts, _bundles(role))
    return rows


def _processes(role: RolePlan) -> str:
    """`1`, or `1 (0 to 8 by load)`."""
    scaled = role.autoscale
    return str(role.count) if scaled is None else f"{role.count} ({scaled.min} to {scaled.max} by load)"


def _room(plan: Plan, cluster: ClusterView) -> Iterator[str]:
    """Roles that may ask for more workers than the cluster has room for."""
    left = fit(plan.bundles, cluster).left
    free = ClusterView(tuple(Node(node.name, left[node.name], node.labels) for node in cluster.nodes))
    for role in plan.elastic:
        if role.autoscale is None or role.host is not None:
            continue
        most = role.autoscale.max
        room = role.count + how_many_fit(role.own_bundle, free, at_most=most - role.count)
        if room < most:
            yield f"{role.name}: room for {room} of the {most} that autoscale allows"


def _turns(plan: Plan, roles: Sequence[str]) -> str:
    """What one of the roles that share devices needs at a time, where all of them would need the sum."""
    said = f"{', '.join(roles)}: take turns; one is awake at a time, the others sleep"
    if not any(plan.roles[role].resources.get("GPU") for role in roles):
        return f"{said}, and on a CPU keep their memory"
    known = {role: memory for role in roles if (memory := plan.roles[role].memory) is not None}
    if len(known) < len(roles):
        return said
    largest = max(known, key=lambda role: known[role].on_device)
    together = sum(memory.on_device for memory in known.values())
    return (
        f"{said}; about {known[largest].on_device:.2f} GiB of each GPU are in use at most ({largest}) instead of "
        f"{together:.2f}, and up to {together - min(m.on_device for m in known.values()):.2f} wait on the host"
    )


def _memory(memory: Memory) -> tuple[str, str]:
    """The total, and its parts of at least 0.01 GiB."""
    named = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "KV cache": memory.kv_cache,
        "averages": memory.averages,
        "companion": memory.companion,
        "process": memory.process,
    }
    parts = [f"{name} {gib:.2f}" for name, gib in named.items() if gib >= 0.005]
    return f"{memory.total:.2f}", ", ".join(parts)


def _bundles(role: RolePlan) -> str:
    if role.host is not None:
        return f"those of {role.host}"
    if role.elastic:
        return "one each, joins and leaves alone"
    return f"{role.bundles[0]}-{role.bundles[-1]} of the gang" if role.count > 1 else f"{role.bundles[0]} of the gang"


def _placement(plan: Plan, cluster: ClusterView) -> Rows:
    bundles = plan.bundles
    found = fit(bundles, cluster)
    rows = Rows("node", "holds", "left")
    for node in cluster.nodes:
        held = Counter(bundle.label for bundle, at in zip(bundles, found.nodes, strict=True) if at == node.name)
        left = {kind: found.left[node.name].get(kind, 0.0) for kind in ("GPU", "CPU")}
        rows.add(node.name, ", ".join(f"{count} x {label}" for label, count in held.items()), describe(left))
    return rows


def _heading(text: str) -> Text:
    return Text(text, "bold")
