"""The application: the routes behind the gate, with every error in one shape."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib import metadata

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer

from orchestrator.service import chat_routes, control_routes, health_routes, planning_routes, reading_routes
from orchestrator.service.answers import Answers
from orchestrator.service.errors import documented, handle_errors
from orchestrator.service.gate import Gate
from orchestrator.service.jobs import Jobs, ProcessJobs, RayJobs
from orchestrator.service.metric_lines import MetricFiles
from orchestrator.service.page_routes import add_page
from orchestrator.service.run_folders import RunFolders
from orchestrator.service.run_queue import RunQueue, looking
from orchestrator.service.settings import Settings
from orchestrator.service.submissions import Submissions

# What the schema says of the token; `Gate` is what checks it, on every path.
BEARER = Depends(HTTPBearer(auto_error=False, description="The service's token."))


def create_app(settings: Settings, jobs: Jobs | None = None) -> FastAPI:
    """`jobs`: where runs are started; None: as the settings say. While the application is served, a thread looks after
    the queue."""
    jobs = jobs or (RayJobs(settings.dashboard) if settings.dashboard else ProcessJobs())
    queue = RunQueue(settings.runs, jobs, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        with looking(queue):
            yield

    app = FastAPI(
        title="Troupe",
        version=metadata.version("troupe"),
        description="Post-training runs on a Ray cluster: submit, watch, control.",
        docs_url="/docs",
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        responses=documented(503),
    )
    app.state.settings = settings
    app.state.jobs = jobs
    app.state.runs = RunFolders(settings.runs)
    app.state.metric_files = MetricFiles()
    app.state.submissions = Submissions(app.state.runs, jobs, queue)
    handle_errors(app)
    app.include_router(health_routes.open_router)
    for routes in (health_routes, reading_routes, control_routes, chat_routes, planning_routes):
        app.include_router(routes.router, dependencies=[BEARER])
    add_page(app)
    app.add_middleware(Answers, fresh_s=settings.fresh_s)
    app.add_middleware(Gate, settings=settings)  # added last: it stands before all others
    return app
