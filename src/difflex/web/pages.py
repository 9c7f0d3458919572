"""`Pages`: renders the templates of the web app, and errors as pages or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import final
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from difflex.study import Study
from difflex.web.answers import ExampleAnswer, NeighbourAnswer

HERE = Path(__file__).parent


def place(site: str, label: str, feature: int | None = None) -> str:
    """Return the address of a dictionary, or of one of its features."""
    address = f"/d/{_quoted(site, label)}"
    return address if feature is None else f"{address}/{feature}"


def place_image(site: str, label: str, shot: int) -> str:
    """Return the address of an image in the book of a dictionary, by its shot."""
    return f"/image/{_quoted(site, label)}/{shot}"


@lru_cache(256)
def _quoted(site: str, label: str) -> str:
    return f"{quote(site, safe=':')}/{quote(label)}"


@final
@dataclass(frozen=True)
class Pages:
    """Renders the templates."""

    study: Study
    can_paint: bool
    """Whether there is a model to generate images with."""
    is_static: bool = False
    """Whether the pages are written to files, without a server."""

    def render(self, template: str, status: int = 200, **values: object) -> HTMLResponse:
        """Return a page."""
        common = {
            "study": self.study,
            "can_paint": self.can_paint,
            "is_static": self.is_static,
            "place": place,
            "place_image": place_image,
        }
        return HTMLResponse(_environment().get_template(template).render(**common, **values), status)

    def problem(self, request: Request, status: int, sentence: str) -> Response:
        """Return an error as a page; below /api, and for those who ask for it, as JSON."""
        if request.url.path.startswith("/api") or request.headers.get("accept") == "application/json":
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
    environment.filters |= {"of_kind": _of_kind, "share": _share, "figure": _figure}
    return environment


def _of_kind(entries: Sequence[ExampleAnswer] | Sequence[NeighbourAnswer], kind: str) -> list[ExampleAnswer | NeighbourAnswer]:
    """Return the entries of a kind; the filters of Jinja take much longer."""
    return [entry for entry in entries if entry.kind == kind]


def _share(value: float | None) -> str:
    """Return a share in per cent."""
    return "-" if value is None else f"{100 * value:.3g} %"


def _figure(value: float | None) -> str:
    """Return a number with three digits."""
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
