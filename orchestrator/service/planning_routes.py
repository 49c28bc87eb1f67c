"""Routes about what could be run: the methods, and the plan of a recipe."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from orchestrator.service import planning
from orchestrator.service.departures import while_it_waits
from orchestrator.service.errors import documented
from orchestrator.service.recipes import config_of
from orchestrator.service.schemas import MethodDescription, MethodList, PlanReport, Recipe

router = APIRouter(prefix="/v1", tags=["planning"], responses=documented(401))


@router.get("/methods")
def list_methods() -> MethodList:
    """Every method that comes with Troupe, with its options."""
    from orchestrator.methods import METHODS  # imports the losses, and torch
    from orchestrator.reporting.catalogue import as_data, described

    return MethodList(methods=[MethodDescription(**as_data(described(name))) for name in METHODS])


@router.post("/plan", responses=documented(400, 403, 413, 422, 429, 504))
async def plan(recipe: Recipe, request: Request) -> PlanReport:
    """What a run of this recipe would launch, and why it would be refused. Opens its models and data, launches
    nothing."""
    settings = request.app.state.settings
    config = await run_in_threadpool(config_of, recipe, runs=settings.runs, allow_code=settings.allow_code)
    return PlanReport(**await while_it_waits(request, planning.plan(config, settings.ray_address)))
