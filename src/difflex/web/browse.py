"""The addresses to browse a study: walls, features, search, images."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from typing import Annotated, NamedTuple

from fastapi import Depends, FastAPI, Query, Request
from fastapi.responses import RedirectResponse, Response
from starlette.datastructures import URL
from starlette.exceptions import HTTPException

from difflex.errors import BadInput, BrokenFile, DifflexError
from difflex.features import ImageAlbum
from difflex.web.answers import Ballot, DictionaryAnswer, FeatureAnswer, FoundAnswer, ShownExplanation, WallAnswer
from difflex.web.catalogue import MOST_TILES, SORTS, Catalogue, WallQuery
from difflex.web.mapping import MapBox
from difflex.web.pages import Pages, place

TILES = 60
"""On the first part of a wall."""
FOREVER = {"cache-control": "public, max-age=31536000, immutable"}
"""Of images, whose names are checksums of their content."""
LONGEST = 200
"""Letters of a word or a name in a request."""

Words = Annotated[str, Query(max_length=LONGEST)]
Conditions = Annotated[list[str], Query(max_length=10)]


def add_browsing(app: FastAPI, catalogue: Catalogue, pages: Pages) -> None:
    """Add the pages of walls and features, and their JSON twins."""
    _add_data(app, catalogue)
    _add_pages(app, catalogue, pages)


def add_images(app: FastAPI, albums: Sequence[ImageAlbum]) -> None:
    """Add the address of the images of `albums`; names are checksums, so it does not matter which album has one."""

    @app.get("/images/{file}", include_in_schema=False)
    def image(file: str) -> Response:
        problem = ""
        for album in albums:
            try:
                return Response(album.read(file), media_type="image/webp", headers=FOREVER)
            except BrokenFile as error:
                problem = problem or str(error)
        raise HTTPException(404, problem)


async def _query(
    sort: Words = "ap",
    ascending: bool = False,
    where: Conditions = [],  # noqa: B006 (FastAPI copies it)
    concept: Words = "",
    q: Words = "",
    like: Annotated[int | None, Query(ge=0, le=10**9)] = None,
    within: Words = "",
) -> WallQuery:
    """Read the query of a wall from an address; asynchronous, so that it needs no thread of its own."""
    if any(len(text) > LONGEST for text in where):
        raise BadInput(f"A condition has more than {LONGEST} letters. Write a column, one of < <= > >= = and a number.")
    conditions = [part.strip() for text in where for part in text.split(",")]
    return WallQuery(sort, ascending, tuple(filter(None, conditions)), concept, q, like, _box(within))


AskedWall = Annotated[WallQuery, Depends(_query)]


def _box(text: str) -> MapBox | None:
    """Read a rectangle of a map: left, top, right, bottom."""
    if not text:
        return None
    try:
        left, top, right, bottom = (float(part) for part in text.split(","))
    except ValueError:
        left = top = right = bottom = nan
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise BadInput(f"'{text}' is no rectangle of a map. Write left, top, right and bottom, from 0 to 1: 0.2,0.2,0.5,0.4.")
    return MapBox(left, top, right, bottom)


class _Chip(NamedTuple):
    """A condition of a wall that has no field of its own, and the address of the wall without it."""

    name: str
    value: str
    text: str
    without: str


def _chips(url: URL, query: WallQuery) -> list[_Chip]:
    texts: dict[str, tuple[str, str]] = {}
    if query.like is not None:
        texts["like"] = (str(query.like), f"like feature {query.like}")
    if query.within is not None:
        texts["within"] = (",".join(f"{number:g}" for number in query.within), "in a part of the map")
    return [_Chip(name, *texts[name], f"?{url.remove_query_params([name, 'token']).query}") for name in texts]


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
        """Features of a dictionary as tiles: sorted, filtered by conditions such as `density<0.01`, by concept or by words.

        `like` shows a feature and its neighbours, nearest first; `within` those in a rectangle of the map.
        """
        return catalogue.wall(catalogue.find(site, label), query, offset, limit)

    @app.get("/api/dictionaries/{site}/{label}/features/{feature}")
    def feature(site: str, label: str, feature: int) -> FeatureAnswer:
        """All that is known of a feature."""
        return catalogue.feature(catalogue.find(site, label), feature)

    @app.post("/api/dictionaries/{site}/{label}/features/{feature}/votes")
    def vote(site: str, label: str, feature: int, ballot: Ballot) -> ShownExplanation:
        """Agree or disagree with an explanation of a feature; the answer is the explanation with all votes."""
        return catalogue.vote(catalogue.find(site, label), feature, ballot)

    @app.get("/api/search")
    def search(q: Words) -> list[FoundAnswer]:
        """Features of all dictionaries by words: concepts, explanations, captions of their strongest images."""
        return catalogue.search(q)


def _add_pages(app: FastAPI, catalogue: Catalogue, pages: Pages) -> None:
    """Add the addresses whose answers are pages."""

    @app.get("/", include_in_schema=False)
    def front() -> Response:
        first = catalogue.front()
        if first is None:
            return pages.render("empty.html", title="Nothing to show yet")
        return RedirectResponse(place(str(first.site), first.label), 307)

    @app.get("/d/{site}/{label}", include_in_schema=False)
    def wall(request: Request, site: str, label: str, query: AskedWall) -> Response:
        ref = catalogue.find(site, label)
        answer = catalogue.wall(ref, query, 0, TILES)
        choices = {"dictionaries": catalogue.dictionaries(), "concepts": catalogue.concepts(ref), "sorts": SORTS}
        return pages.render("wall.html", title=str(ref), wall=answer, asked=query, chips=_chips(request.url, query), **choices)

    @app.get("/d/{site}/{label}/{feature}", include_in_schema=False)
    def feature(site: str, label: str, feature: int) -> Response:
        answer = catalogue.feature(catalogue.find(site, label), feature)
        names = [str(ref) for ref in catalogue.with_books()]
        return pages.render("feature.html", title=answer.name, feature=answer, names=names)

    @app.get("/search", include_in_schema=False)
    def search(q: Words = "") -> Response:
        found, problem = [], ""
        try:
            found = catalogue.search(q) if q.strip() else []
        except DifflexError as error:
            problem = str(error)
        return pages.render("search.html", title=f"Search: {q}", q=q, found=found, problem=problem)
