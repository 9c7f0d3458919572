"""The web app: a page for each address, and its JSON twin under /api."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from difflex._version import __version__
from difflex.errors import BadInput, DifflexError, UnknownName
from difflex.study import Study
from difflex.web.browse import add_browsing
from difflex.web.catalogue import Catalogue
from difflex.web.guard import LOCAL, Guard
from difflex.web.pages import HERE, Pages

__all__ = ["make_app"]


def make_app(study: Study, hosts: tuple[str, ...] = LOCAL, token: str | None = None) -> Guard:
    """Return the app of a study for requests to `hosts`, and with a `token` for those who know it."""
    app = FastAPI(
        title=f"difflex: {study.folder.resolve().name}", version=__version__, openapi_url="/api", docs_url=None, redoc_url=None
    )
    app.mount("/static", StaticFiles(directory=HERE / "static"))
    catalogue, pages = Catalogue(study), Pages(study)
    add_browsing(app, catalogue, pages)
    _add_refusals(app, pages)
    return Guard(app, hosts=hosts, token=token)


def _add_refusals(app: FastAPI, pages: Pages) -> None:
    """Answer what goes wrong with a sentence: as a page, or as JSON."""

    @app.exception_handler(DifflexError)
    def refuse(request: Request, error: DifflexError) -> Response:
        return pages.problem(
            request, 404 if isinstance(error, UnknownName) else 422 if isinstance(error, BadInput) else 409, str(error)
        )

    @app.exception_handler(RequestValidationError)
    def refuse_values(request: Request, error: RequestValidationError) -> Response:
        [first, *_] = error.errors()
        return pages.problem(request, 422, f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}.")

    @app.exception_handler(HTTPException)
    def refuse_address(request: Request, error: HTTPException) -> Response:
        return pages.problem(request, error.status_code, str(error.detail))
