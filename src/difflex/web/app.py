"""The web app: a page for each address, and its JSON twin under /api."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from difflex._version import __version__
from difflex.errors import BadInput, DifflexError, UnknownName
from difflex.features import ImageAlbum
from difflex.study import Study
from difflex.web.answers import ProblemAnswer
from difflex.web.browse import add_browsing, add_images
from difflex.web.browse_map import add_map
from difflex.web.catalogue import Catalogue
from difflex.web.compare import add_comparing
from difflex.web.guard import LOCAL, Guard
from difflex.web.pages import HERE, Pages
from difflex.web.painting import add_paint_page, add_painting
from difflex.web.reading import add_reading
from difflex.web.studio import QueueFull, Studio

__all__ = ["make_app"]

THREADS = 4
REFUSALS: dict[int | str, str] = {
    404: "It does not exist",
    409: "The study is damaged or incomplete",
    422: "A value cannot be",
    429: "Too many requests wait",
}


def make_app(
    study: Study,
    studio: Studio | None = None,
    hosts: tuple[str, ...] = LOCAL,
    token: str | None = None,
    against: Study | None = None,
) -> Guard:
    """Return the app of a study for requests to `hosts`, and with a `token` for those who know it.

    Without a `studio` it shows what is in the study, and generates nothing. Dictionaries of another study can be compared with.
    """
    app = FastAPI(
        title=f"difflex: {study.folder.resolve().name}",
        version=__version__,
        openapi_url="/api",
        docs_url=None,
        redoc_url=None,
        lifespan=_few_threads,
        responses={code: {"model": ProblemAnswer, "description": text} for code, text in REFUSALS.items()},
    )
    app.mount("/static", StaticFiles(directory=HERE / "static"))
    catalogue, pages = Catalogue(study), Pages(study, can_paint=studio is not None)
    add_browsing(app, catalogue, pages)
    add_map(app, catalogue, pages)
    add_images(app, [ImageAlbum(each.images) for each in (study, against) if each is not None])
    add_comparing(app, catalogue, pages, None if against is None else Catalogue(against))
    add_paint_page(app, pages)
    add_reading(app, catalogue, pages, studio)
    if studio is not None:
        add_painting(app, catalogue, studio)
    _add_refusals(app, pages)
    return Guard(app, hosts=hosts, token=token)


@asynccontextmanager
async def _few_threads(app: FastAPI) -> AsyncIterator[None]:
    """Answer with few threads: many that compute wait for each other more than they work."""
    to_thread.current_default_thread_limiter().total_tokens = THREADS
    yield


def _add_refusals(app: FastAPI, pages: Pages) -> None:
    """Answer what goes wrong with a sentence: as a page, or as JSON."""

    @app.exception_handler(DifflexError)
    def refuse(request: Request, error: DifflexError) -> Response:
        kinds = {UnknownName: 404, BadInput: 422, QueueFull: 429}
        return pages.problem(request, next((code for kind, code in kinds.items() if isinstance(error, kind)), 409), str(error))

    @app.exception_handler(RequestValidationError)
    def refuse_values(request: Request, error: RequestValidationError) -> Response:
        [first, *_] = error.errors()
        return pages.problem(request, 422, f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}.")

    @app.exception_handler(HTTPException)
    def refuse_address(request: Request, error: HTTPException) -> Response:
        answer = pages.problem(request, error.status_code, str(error.detail))
        answer.headers.update(error.headers or {})
        return answer
