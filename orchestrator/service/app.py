"""The application: the routes behind the gate, with every error in one shape."""

from __future__ import annotations

from importlib import metadata

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer

from orchestrator.service import health_routes, planning_routes, reading_routes
from orchestrator.service.errors import handle_errors
from orchestrator.service.gate import Gate
from orchestrator.service.page_routes import add_page
from orchestrator.service.run_folders import RunFolders
from orchestrator.service.settings import Settings

# What the schema says of the token; `Gate` is what checks it, on every path.
BEARER = Depends(HTTPBearer(auto_error=False, description="The service's token."))


def create_app(settings: Settings) -> FastAPI:
    app = FastAPI(
        title="Troupe",
        version=metadata.version("troupe"),
        description="Post-training runs on a Ray cluster: submit, watch, control.",
        docs_url="/docs",
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.settings = settings
    app.state.runs = RunFolders(settings.runs)
    handle_errors(app)
    app.include_router(health_routes.open_router)
    for router in (health_routes.router, reading_routes.router, planning_routes.router):
        app.include_router(router, dependencies=[BEARER])
    add_page(app)
    app.add_middleware(Gate, settings=settings)
    return app
