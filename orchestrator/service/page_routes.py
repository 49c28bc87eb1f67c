"""The page: static files that are the same for everyone, so they need no token. What they show comes from the API."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from starlette.staticfiles import StaticFiles

from orchestrator.service.gate import PAGE

FOLDER = Path(__file__).parent / "page"
# A sample's text is never read as HTML; if it were, a browser would run nothing of it.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def add_page(app: FastAPI) -> None:
    app.mount(PAGE, StaticFiles(directory=FOLDER))

    @app.get("/", include_in_schema=False)
    def index() -> FileResponse:
        return FileResponse(FOLDER / "index.html", headers=HEADERS)
