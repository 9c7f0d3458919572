"""The addresses to paint with features: a page, its settings, images as they come, and records for `difflex steer --replay`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from fastapi import FastAPI
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from difflex.dictionary_config import read_config
from difflex.errors import BadInput, UnknownName
from difflex.records import Edit, Rectangle, RegionMap, Shot
from difflex.web.answers import Answer, TileAnswer
from difflex.web.browse import FOREVER
from difflex.web.catalogue import Catalogue
from difflex.web.pages import Pages
from difflex.web.streams import LINES, stream
from difflex.web.studio import Event, ImageModel, Report, Shelf, Studio, Suggestion

MOST_IMAGES = 64
"""Images of one request, the unedited ones included."""
MOST_STEPS = 100
SUGGESTED = 12
"""Edits to begin with."""

Name = Annotated[str, Field(max_length=200)]
Client = Annotated[str, Field(pattern=r"^[\w-]{8,64}$")]
"""The client of a request: a random name that the page keeps; a new request cancels the older one of the same name."""
Share = Annotated[float, Field(ge=0, le=1)]


class Request(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MapRequest(Request):
    """How much each token is edited."""

    rows: Annotated[int, Field(ge=1, le=512)]
    columns: Annotated[int, Field(ge=1, le=512)]
    weights: Annotated[str, Field(max_length=400_000)]
    """A byte for each token in row-major order, in base64."""


class EditRequest(Request):
    """A change of the activations at one site, as `difflex steer --record` writes it."""

    operation: Literal["add", "set", "scale", "ablate"] = "add"
    site: Name
    dictionary: Name | None = None
    features: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(max_length=32)] = ()
    contrast: Name | None = None
    strength: Annotated[float, Field(ge=-1000, le=1000)] = 1.0
    unit: Literal["peak", "mean", "norm", "code"] = "peak"
    region: tuple[Share, Share, Share, Share] | MapRequest | Literal["fires"] | None = None
    """Left, top, right, bottom; a map; or where the features fire. A mask image cannot be named here."""
    steps: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]] | None = None
    half: Literal["conditional", "both", "opposed"] = "conditional"

    def edit(self, factor: float = 1.0) -> Edit:
        """Return the edit as a record, its strength times `factor`."""
        region = self.region
        if isinstance(region, MapRequest):
            region = RegionMap(**region.model_dump())
        elif isinstance(region, tuple):
            region = Rectangle(*region)
        return Edit(**{**dict(self), "region": region, "strength": self.strength * factor})


class ImageRequest(Request):
    """An image to generate."""

    prompt: Annotated[str, Field(max_length=2000)] = ""
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None
    """Denoising steps; by default those of the study."""
    edits: Annotated[tuple[EditRequest, ...], Field(max_length=16)] = ()


class GenerateRequest(ImageRequest):
    """Images to generate: each seed without the edits, then under the edits at each factor of their strengths."""

    client: Client
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(min_length=1, max_length=16)] = (0,)
    factors: Annotated[tuple[Annotated[float, Field(ge=-100, le=100)], ...], Field(min_length=1, max_length=16)] = (1.0,)


class RecordRequest(ImageRequest):
    """An edited image to make a record of."""

    client: Client
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class PaintedDictionary(Answer):
    """A dictionary to paint with."""

    site: str
    label: str
    grid: tuple[int, int] | None
    """Rows and columns of its tokens in an image; null for text, and without a book."""


class SuggestionAnswer(Answer):
    """An edit to begin with."""

    concept: str
    site: str
    label: str
    strength: float
    gain: float
    """By how much the share of images that show the concept rose when it was measured."""
    prompt: str
    tile: TileAnswer


class PaintAnswer(Answer):
    """What a page to paint on starts from."""

    model: str
    pixels: tuple[int, int] | None
    steps: int | None
    dictionaries: list[PaintedDictionary]
    contrasts: dict[str, str]
    """The site of each contrast direction."""
    suggestions: list[SuggestionAnswer]


def add_paint_page(app: FastAPI, pages: Pages) -> None:
    """Add the page to paint on; without a model it says so."""

    @app.get("/paint", include_in_schema=False)
    def paint() -> Response:
        return pages.render("paint.html", title="Paint")


def add_painting(app: FastAPI, catalogue: Catalogue, studio: Studio) -> None:
    """Add what the page to paint on asks for."""

    @app.get("/api/paint")
    def settings() -> PaintAnswer:
        """The model's settings in this study, what can be painted with, and edits to begin with."""
        return _settings(catalogue, studio)

    @app.post("/api/generate", response_class=Response, responses={200: {"content": {LINES: {}}, "description": "Events"}})
    async def generate(request: GenerateRequest) -> Response:
        """Generate images. The answer is a JSON object on each line as they come; `type` is one of:
        waiting (`before`: jobs ahead), loading, step (`step` of `steps`), image (`seed`, `factor` or null for the unedited one,
        `image`: its file at /generated/FILE), done, cancelled, or error (`error`: a sentence).
        """
        number = len(request.seeds) * (1 + len(request.factors) * bool(request.edits))
        if number > MOST_IMAGES:
            raise BadInput(f"{number} images are too many at once: ask for at most {MOST_IMAGES}, with fewer seeds or factors.")
        _check(catalogue, request.edits)
        return stream(studio, request.client, lambda model, report: _generate(model, report, request, studio.shelf))

    @app.post("/api/record", response_class=Response, responses={200: {"content": {LINES: {}}, "description": "Events"}})
    async def record(request: RecordRequest) -> Response:
        """Return the record of an edited image, for `difflex steer --replay`: in the event `record`, as the text of a file."""
        if not request.edits:
            raise BadInput("There is no edit to record. Add a feature first.")
        _check(catalogue, request.edits)
        edits = [edit.edit() for edit in request.edits]

        def work(model: ImageModel, report: Report) -> Iterator[Event]:
            [shot] = model.shots(request.prompt, [request.seed], request.steps)
            yield {"type": "record", "record": model.record(shot, edits)}

        return stream(studio, request.client, work)

    @app.get("/generated/{file}", include_in_schema=False)
    def generated(file: str) -> Response:
        content = studio.shelf.get(file)
        if content is None:
            raise HTTPException(404, "This image is not kept any more. Generate it again.")
        return Response(content, media_type="image/png", headers=FOREVER)


def _check(catalogue: Catalogue, edits: Sequence[EditRequest]) -> None:
    """Refuse what does not exist, before anybody waits for it."""
    for edit in edits:
        edit.edit()
        if edit.contrast is not None and not catalogue.study.contrast(edit.contrast).is_file():
            raise UnknownName.among("The contrast", edit.contrast, catalogue.study.contrasts())
        if edit.contrast is None:
            ref = catalogue.find(edit.site, edit.dictionary or "")
            size = read_config(catalogue.study.dictionary(*ref)).size
            if not edit.features or max(edit.features) >= size:
                raise BadInput(f"{edit.features or 'No feature'} is not of {ref}, whose features are numbered 0 to {size - 1}.")


def _generate(model: ImageModel, report: Report, request: GenerateRequest, shelf: Shelf) -> Iterator[Event]:
    """Generate the images of a request in batches, and yield each; unedited ones that are kept are not generated again."""
    shots = model.shots(request.prompt, request.seeds, request.steps)
    missing = [shot for shot in shots if shelf.unedited(shot) is None]
    yield from (_image(shot, None, name) for shot in shots if (name := shelf.unedited(shot)) is not None)
    for batch in _batches(missing, model.batch):
        for shot, image in zip(batch, model.images(batch, [], report), strict=True):
            yield _image(shot, None, shelf.add(image, shot))
    for factor in request.factors if request.edits else ():
        edits = [edit.edit(factor) for edit in request.edits]
        for batch in _batches(shots, model.batch):
            for shot, image in zip(batch, model.images(batch, edits, report), strict=True):
                yield _image(shot, factor, shelf.add(image))


def _batches(shots: Sequence[Shot], size: int) -> Iterator[Sequence[Shot]]:
    return (shots[first : first + size] for first in range(0, len(shots), size))


def _image(shot: Shot, factor: float | None, name: str) -> Event:
    return {"type": "image", "seed": shot.seed, "factor": factor, "image": name}


def _settings(catalogue: Catalogue, studio: Studio) -> PaintAnswer:
    study, choices = catalogue.study, studio.choices()
    dictionaries = [
        PaintedDictionary(site=entry.site, label=entry.label, grid=catalogue.grid(catalogue.find(entry.site, entry.label)))
        for entry in catalogue.dictionaries()
        if entry.has_book
    ]
    with_book = {(entry.site, entry.label) for entry in dictionaries}
    suggested = [found for found in choices.suggestions if (str(found.ref.site), found.ref.label) in with_book]
    return PaintAnswer(
        model=study.model,
        pixels=study.settings.pixels,
        steps=study.settings.steps,
        dictionaries=dictionaries,
        contrasts={name: str(site) for name, site in choices.contrasts.items()},
        suggestions=[_suggestion(catalogue, found) for found in suggested[:SUGGESTED]],
    )


def _suggestion(catalogue: Catalogue, found: Suggestion) -> SuggestionAnswer:
    [tile] = catalogue.tiles(found.ref, [found.feature])
    prompts = (prompt for prompt in catalogue.prompts(found.ref) if prompt.strip() and found.concept not in prompt)
    return SuggestionAnswer(
        concept=found.concept,
        site=str(found.ref.site),
        label=found.ref.label,
        strength=found.strength,
        gain=found.gain,
        prompt=next(prompts, ""),
        tile=tile,
    )
