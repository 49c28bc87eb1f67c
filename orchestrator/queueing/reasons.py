"""Why a run does not fit, in words. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from orchestrator.planning.bundles import SLACK, Bundle, ClusterView, Resources, amount, shortages

SHOWN = 5  # runs that hold something, the largest first

Holders = Callable[[str], Mapping[str, float]]  # resource -> run -> how much of it


def holders(held: Mapping[str, Iterable[Resources]]) -> Holders:
    """`held`: run -> everything that it holds or will hold."""

    def of(resource: str) -> Mapping[str, float]:
        total = {run: sum(each.get(resource, 0.0) for each in parts) for run, parts in held.items()}
        return {run: value for run, value in total.items() if value > SLACK}

    return of


def lacking(
    bundles: Sequence[Bundle], claims: Sequence[Bundle], whole: ClusterView, free: ClusterView, held: Holders
) -> str:
    """`3 CPU: 2 of 8 are free; run x holds 4, run y 2`, for each resource of which too little is free. `claims`: what
    runs that have been started are about to reserve."""
    short = [text for resource in _kinds(bundles) if (text := _short(resource, bundles, claims, whole, free, held))]
    if short:
        return "; ".join(short)
    lines = shortages([*claims, *bundles], free)
    return f"room on one node: enough is free in all; {'; '.join(lines)}"


def _kinds(bundles: Sequence[Bundle]) -> list[str]:
    return list(dict.fromkeys(name for bundle in bundles for name, value in bundle.resources.items() if value))


def _short(
    resource: str,
    bundles: Sequence[Bundle],
    claims: Sequence[Bundle],
    whole: ClusterView,
    free: ClusterView,
    held: Holders,
) -> str | None:
    wanted = sum(bundle.resources.get(resource, 0.0) for bundle in bundles)
    taken = sum(bundle.resources.get(resource, 0.0) for bundle in claims)
    there = max(0.0, free.total(resource) - taken)
    if wanted <= there + SLACK:
        return None
    total = whole.total(resource)
    by_run = held(resource)
    parts = [f"run {run} holds {_number(resource, value)}" for run, value in _largest(by_run)]
    others = total - there - sum(by_run.values())
    if others > SLACK:
        parts.append(f"others hold {_number(resource, others)}")
    text = f"{amount(resource, wanted)}: {_number(resource, there)} of {_number(resource, total)} are free"
    return f"{text} ({', '.join(parts)})" if parts else text


def _largest(by_run: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(by_run.items(), key=lambda item: (-item[1], item[0]))[:SHOWN]


def _number(resource: str, value: float) -> str:
    """Without the name of the resource, unless that gives the unit."""
    return amount(resource, value).removesuffix(f" {resource}")
