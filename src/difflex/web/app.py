"""The web app: a page for each address, and its JSON twin under /api."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, final
from urllib.parse import quote

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.exceptions import HTTPException

from difflex._version import __version__
from difflex.errors import BadInput, DifflexError, UnknownName
from difflex.features import ImageAlbum
from difflex.study import Study
from difflex.web.answers import DictionaryAnswer, FeatureAnswer, FoundAnswer, WallAnswer
from difflex.web.catalogue import MOST_TILES, SORTS, Catalogue, WallQuery
from difflex.web.guard import LOCAL, Guard

__all__ = ["make_app"]

HERE = Path(__file__).parent
TILES = 60
"""On the first part of a wall."""
FOREVER = {"cache-control": "public, max-age=31536000, immutable"}
"""Of images, whose names are checksums of their content."""
LONGEST = 200
"""Letters of a word or a name in a request."""

Words = Annotated[str, Query(max_length=LONGEST)]
Conditions = Annotated[list[str], Query(max_length=10)]


def make_app(study: Study, hosts: tuple[str, ...] = LOCAL, token: str | None = None) -> Guard:
    """Return the app of a study for requests to `hosts`, and with a `token` for those who know it."""
    app = FastAPI(
        title=f"difflex: {study.folder.resolve().name}", version=__version__, openapi_url="/api", docs_url=None, redoc_url=None
    )
    app.mount("/static", StaticFiles(directory=HERE / "static"))
    catalogue = Catalogue(study)
    _add_data(app, catalogue)
    _add_pages(app, catalogue, _Pages(study))
    _add_refusals(app, _Pages(study))
    return Guard(app, hosts=hosts, token=token)


def _query(
    sort: Words = "ap",
    ascending: bool = False,
    where: Conditions = [],  # noqa: B006 (FastAPI copies it)
    concept: Words = "",
    q: Words = "",
) -> WallQuery:
    """Read the query of a wall from an address."""
    if any(len(text) > LONGEST for text in where):
        raise BadInput(f"A condition has more than {LONGEST} letters. Write a column, one of < <= > >= = and a number.")
    conditions = [part.strip() for text in where for part in text.split(",")]
    return WallQuery(sort, ascending, tuple(filter(None, conditions)), concept, q)


AskedWall = Annotated[WallQuery, Depends(_query)]


def _add_data(app: FastAPI, catalogue: Catalogue) -> None:
    """Add the addresses whose answers are JSON."""

    @app.get("/api/dictionaries")
    def dictionaries() -> list[DictionaryAnswer]:
        """The dictionaries of the study, those with a book first."""
        return catalogue.dictionaries()

    @app.get("/api/dictionaries/{site}/{label}/features")
    def features(
        site: str,
        label: str,
        query: AskedWall,
        offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
        limit: Annotated[int, Query(ge=1, le=MOST_TILES)] = TILES,
    ) -> WallAnswer:
        """Features of a dictionary as tiles: sorted, filtered by conditions such as `density<0.01`, by concept or by words."""
        return catalogue.wall(catalogue.find(site, label), query, offset, limit)

    @app.get("/api/dictionaries/{site}/{label}/features/{feature}")
    def feature(site: str, label: str, feature: int) -> FeatureAnswer:
        """All that is known of a feature."""
        return catalogue.feature(catalogue.find(site, label), feature)

    @app.get("/api/search")
    def search(q: Words) -> list[FoundAnswer]:
        """Features of all dictionaries by words: concepts, explanations, captions of their strongest images."""
        return catalogue.search(q)


def _add_pages(app: FastAPI, catalogue: Catalogue, pages: _Pages) -> None:
    """Add the addresses whose answers are pages, and the images."""
    album = ImageAlbum(catalogue.study.images)

    @app.get("/", include_in_schema=False)
    def front() -> Response:
        first = catalogue.front()
        if first is None:
            return pages.render("empty.html", title="Nothing to show yet")
        return RedirectResponse(place(str(first.site), first.label), 307)

    @app.get("/d/{site}/{label}", include_in_schema=False)
    def wall(site: str, label: str, query: AskedWall) -> Response:
        ref = catalogue.find(site, label)
        answer = catalogue.wall(ref, query, 0, TILES)
        choices = {"dictionaries": catalogue.dictionaries(), "concepts": catalogue.concepts(ref), "sorts": SORTS}
        return pages.render("wall.html", title=str(ref), wall=answer, asked=query, **choices)

    @app.get("/d/{site}/{label}/{feature}", include_in_schema=False)
    def feature(site: str, label: str, feature: int) -> Response:
        answer = catalogue.feature(catalogue.find(site, label), feature)
        return pages.render("feature.html", title=answer.name, feature=answer)

    @app.get("/search", include_in_schema=False)
    def search(q: Words = "") -> Response:
        found, problem = [], ""
        try:
            found = catalogue.search(q) if q.strip() else []
        except DifflexError as error:
            problem = str(error)
        return pages.render("search.html", title=f"Search: {q}", q=q, found=found, problem=problem)

    @app.get("/images/{file}", include_in_schema=False)
    def image(file: str) -> Response:
        if (problem := album.damage(file)) is not None:
            raise HTTPException(404, problem)
        return FileResponse(album.folder / file, media_type="image/webp", headers=FOREVER)


def _add_refusals(app: FastAPI, pages: _Pages) -> None:
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


def place(site: str, label: str, feature: int | None = None) -> str:
    """Return the address of a dictionary, or of one of its features."""
    address = f"/d/{quote(site, safe=':')}/{quote(label)}"
    return address if feature is None else f"{address}/{feature}"


@final
@dataclass(frozen=True)
class _Pages:
    """Renders the templates."""

    study: Study

    def render(self, template: str, status: int = 200, **values: object) -> HTMLResponse:
        """Return a page."""
        return HTMLResponse(_environment().get_template(template).render(study=self.study, place=place, **values), status)

    def problem(self, request: Request, status: int, sentence: str) -> Response:
        """Return an error as a page, or below /api as JSON."""
        if request.url.path.startswith("/api"):
            return JSONResponse({"error": sentence}, status)
        return self.render("problem.html", status, title="That did not work", sentence=sentence)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"share": _share, "figure": _figure}
    return environment


def _share(value: float | None) -> str:
    """Return a share in per cent."""
    return "-" if value is None else f"{100 * value:.3g} %"


def _figure(value: float | None) -> str:
    """Return a number with three digits."""
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
