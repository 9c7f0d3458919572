"""The addresses of an image: what the book knows of it, and what fires in it when the model generates it again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from typing import Annotated

from fastapi import FastAPI, Path, Query
from fastapi.responses import Response
from pydantic import BeforeValidator, Field

from difflex.dictionary_config import fingerprint
from difflex.errors import BadInput, UnknownName
from difflex.features.entries import ShotRow
from difflex.study import DictionaryRef
from difflex.web.answers import Answer
from difflex.web.browse import Words
from difflex.web.catalogue import Catalogue
from difflex.web.firing import FeatureOrder, Firing, FiringAnswer, KeptReadings, Reading
from difflex.web.pages import Pages
from difflex.web.painting import MOST_STEPS, Client, Name, Request
from difflex.web.streams import LINES, stream
from difflex.web.studio import Event, ImageModel, Report, Shelf, Studio

MOST_DICTIONARIES = 8
TRIALS = 6
"""Prompts to begin with."""
MOST_MAPS = 64
"""Steps times dictionaries of a reading."""

Prompt = Annotated[str, Field(max_length=2000)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Place = Annotated[int, Query(ge=0, le=10**6)]
ShotNumber = Annotated[int, Path(ge=0, le=10**9)]
FeatureNumber = Annotated[int | None, Query(ge=0, le=10**9)]


class ReadRequest(Request):
    """An image to generate and read: one of a book (`dictionary` and `shot`), or a new one (`prompt`, `seed`, `steps`)."""

    client: Client
    dictionary: Name | None = None
    """SITE/LABEL, whose book has the image."""
    shot: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    prompt: Prompt = ""
    seed: Seed = 0
    steps: Steps | None = None
    """Denoising steps; by default those of the study."""
    dictionaries: Annotated[tuple[Name, ...], Field(min_length=1, max_length=MOST_DICTIONARIES)] | None = None
    """SITE/LABEL of each dictionary to read it with; by default those with a book."""


class ImagePlace(Answer):
    """An image in the book of a dictionary."""

    site: str
    label: str
    shot: int


class ImageAnswer(Answer):
    """An image of a book."""

    site: str
    label: str
    shot: int
    image: str
    """Its file, at /images/FILE."""
    width: int
    height: int
    prompt: str
    seed: int
    steps: int
    timesteps: list[float]
    """At which the book has read it."""
    noise: float | None
    """For a given image, which no model generates: how much it was noised before it was read, between 0 and 1."""
    grid: tuple[int, int] | None
    places: list[ImagePlace]
    """The same image in the books of all dictionaries, this one included."""


class ReadDictionary(Answer):
    """A dictionary that an image was read with."""

    site: str
    label: str
    grid: tuple[int, int]
    timesteps: list[float]
    """Those of its book, at which the peaks of its features were measured."""


class ReadingAnswer(Answer):
    """An image that was generated and read."""

    key: str
    """What names the reading at /api/readings/KEY while it is in memory."""
    image: str
    """Its file, at /generated/FILE."""
    width: int
    height: int
    prompt: str
    seed: int
    steps: int
    timesteps: list[float]
    dictionaries: list[ReadDictionary]
    left_out: list[str]
    """Dictionaries of text tokens, which have no place in an image."""


def add_reading(app: FastAPI, catalogue: Catalogue, pages: Pages, studio: Studio | None) -> None:
    """Add the page of an image and what it asks for; without a studio only images of books."""
    _add_books(app, catalogue, pages)
    if studio is not None:
        readings = KeptReadings()
        _add_model(app, catalogue, pages, studio, readings)
        _add_readings(app, catalogue, readings)


def _add_books(app: FastAPI, catalogue: Catalogue, pages: Pages) -> None:
    """Add the addresses that need no model."""

    @app.get("/image/{site}/{label}/{shot}", include_in_schema=False)
    def page(site: str, label: str, shot: ShotNumber) -> Response:
        ref = catalogue.find(site, label)
        image, firing = _image(catalogue, ref, shot), _known(catalogue, ref, shot)
        fires = firing.strongest(catalogue, ref, "both", None) if firing is not None else None
        return pages.render("image.html", title=image.prompt or "Image", image=image, fires=fires, asked=image)

    @app.get("/api/images/{site}/{label}/{shot}")
    def image(site: str, label: str, shot: ShotNumber) -> ImageAnswer:
        """An image of a book."""
        return _image(catalogue, catalogue.find(site, label), shot)

    @app.get("/api/images/{site}/{label}/{shot}/features")
    def features(
        site: str, label: str, shot: ShotNumber, order: FeatureOrder = "both", feature: FeatureNumber = None
    ) -> FiringAnswer:
        """The features that have an example in an image of a book, strongest first; `feature` is there in any case."""
        ref = catalogue.find(site, label)
        return _in_grid(ref, _known(catalogue, ref, shot)).strongest(catalogue, ref, order, _feature(catalogue, ref, feature))

    @app.get("/api/images/{site}/{label}/{shot}/at")
    def at(site: str, label: str, shot: ShotNumber, row: Place, column: Place) -> FiringAnswer:
        """Of the features that have an example in an image of a book, those that fire at a token."""
        ref = catalogue.find(site, label)
        firing = _in_grid(ref, _known(catalogue, ref, shot))
        return firing.at(catalogue, ref, _token(firing, row, column))


def _add_model(app: FastAPI, catalogue: Catalogue, pages: Pages, studio: Studio, readings: KeptReadings) -> None:
    """Add the addresses that generate."""

    @app.get("/image", include_in_schema=False)
    def new(
        prompt: Annotated[str, Query(max_length=2000)] = "",
        seed: Annotated[int, Query(ge=0, lt=2**63)] = 0,
        steps: Annotated[int | None, Query(ge=1, le=MOST_STEPS), BeforeValidator(lambda text: text or None)] = None,
    ) -> Response:
        asked = {"prompt": prompt, "seed": seed, "steps": steps or catalogue.study.settings.steps}
        pixels, front = catalogue.study.settings.pixels or (1, 1), None if prompt else catalogue.front()
        trials = [*dict.fromkeys(filter(str.strip, catalogue.prompts(front)))][:TRIALS] if front else []
        title = prompt or "A new image"
        return pages.render("image.html", title=title, image=None, fires=None, asked=asked, pixels=pixels, trials=trials)

    @app.post("/api/read", response_class=Response, responses={200: {"content": {LINES: {}}, "description": "Events"}})
    async def read(request: ReadRequest) -> Response:
        """Generate an image and read it with dictionaries. The answer is a JSON object on each line as they come, as of
        /api/generate; besides there is `generating` when it begins, and at the end `reading`: the image at /generated/FILE, its
        dictionaries and timesteps, and a key for /api/readings/KEY/features.
        """
        row = _shot(catalogue, request)
        refs = _selected(catalogue, request, row.shot.steps if row else request.steps or catalogue.study.settings.steps)
        work = partial(_read, request=request, row=row, refs=refs, catalogue=catalogue, shelf=studio.shelf, readings=readings)
        return stream(studio, request.client, lambda model, report: work(model, report))


def _add_readings(app: FastAPI, catalogue: Catalogue, readings: KeptReadings) -> None:
    """Add the addresses of what was read."""

    @app.get("/api/readings/{key}/features")
    def features(
        key: str, dictionary: Words, step: Place = 0, order: FeatureOrder = "both", feature: FeatureNumber = None
    ) -> FiringAnswer:
        """The strongest features of a dictionary (SITE/LABEL) in an image at a step, with their maps.

        `order` is `peak`, the largest value in shares of the feature's peak in its book, `area`, the share of the image that it
        covers, or `both`; all count less for a feature that fires at many tokens of any image. `feature` is there in any case.
        """
        ref, firing = _firing(catalogue, readings.get(key), dictionary, step)
        return firing.strongest(catalogue, ref, order, _feature(catalogue, ref, feature))

    @app.get("/api/readings/{key}/at")
    def at(key: str, dictionary: Words, row: Place, column: Place, step: Place = 0) -> FiringAnswer:
        """The features of a dictionary (SITE/LABEL) that fire at a token of an image at a step."""
        ref, firing = _firing(catalogue, readings.get(key), dictionary, step)
        return firing.at(catalogue, ref, _token(firing, row, column))


def _read(
    model: ImageModel,
    report: Report,
    *,
    request: ReadRequest,
    row: ShotRow | None,
    refs: list[DictionaryRef],
    catalogue: Catalogue,
    shelf: Shelf,
    readings: KeptReadings,
) -> Iterator[Event]:
    """Read an image and keep the reading, if it is not kept already; yield its answer."""
    shot = row.shot if row else model.shots(request.prompt, [request.seed], request.steps)[0]
    fingerprints = [(ref, fingerprint(catalogue.study.dictionary(*ref))) for ref in refs]
    key = hashlib.sha256(repr((shot, fingerprints)).encode()).hexdigest()[:32]
    reading = readings.find(key)
    if reading is None or shelf.get(reading.image) is None:
        yield {"type": "generating"}
        image, fired = model.read(shot, [ref for ref in refs if ref.site.stream == "image"], report)
        timesteps = {part.step: part.timestep for part in fired}
        parts = {(part.ref, part.step): Firing.of_tokens(part) for part in fired}
        reading = Reading(shot, shelf.add(image), image.size, tuple(timesteps[step] for step in sorted(timesteps)), parts)
        readings.add(key, reading)
    yield {"type": "reading", **_answer(catalogue, key, reading, refs).model_dump(mode="json")}


def _answer(catalogue: Catalogue, key: str, reading: Reading, refs: list[DictionaryRef]) -> ReadingAnswer:
    grids = {ref: firing.grid for (ref, _), firing in reading.fired.items()}
    return ReadingAnswer(
        key=key,
        image=reading.image,
        width=reading.size[0],
        height=reading.size[1],
        prompt=reading.shot.prompt,
        seed=reading.shot.seed,
        steps=reading.shot.steps,
        timesteps=list(reading.timesteps),
        dictionaries=[_dictionary(catalogue, ref, grids[ref]) for ref in refs if ref in grids],
        left_out=[str(ref) for ref in refs if ref not in grids],
    )


def _dictionary(catalogue: Catalogue, ref: DictionaryRef, grid: tuple[int, int]) -> ReadDictionary:
    with catalogue.book(ref) as book:
        return ReadDictionary(site=str(ref.site), label=ref.label, grid=grid, timesteps=list(book.about.timesteps))


def _shot(catalogue: Catalogue, request: ReadRequest) -> ShotRow | None:
    """Return the shot of a book that a request names; None for a new image."""
    if request.dictionary is None and request.shot is None:
        return None
    if request.dictionary is None or request.shot is None or request.prompt:
        raise BadInput("Name an image of a book by `dictionary` and `shot`, or a new one by `prompt`, `seed` and `steps`.")
    ref = catalogue.study.find_dictionary(request.dictionary)
    [row, *_] = _rows(catalogue, ref, request.shot)
    if row.shot.image is not None:
        raise BadInput(f"Image {request.shot} of {ref} was given, not generated: the model cannot generate it again.")
    return row


def _selected(catalogue: Catalogue, request: ReadRequest, steps: int | None) -> list[DictionaryRef]:
    """Return the dictionaries to read with; by default those with a book, as many as fit."""
    most = max(1, min(MOST_DICTIONARIES, MOST_MAPS // (steps or 1)))
    if request.dictionaries is not None:
        refs = [catalogue.study.find_dictionary(name) for name in dict.fromkeys(request.dictionaries)]
        if len(refs) > most:
            raise BadInput(f"{len(refs)} dictionaries at {steps} steps are too many at once: ask for at most {most}.")
        for ref in refs:
            catalogue.columns(ref)  # without a book its features have no peaks: an error
    else:
        entries = [entry for entry in catalogue.dictionaries() if entry.has_book]
        refs = [catalogue.find(entry.site, entry.label) for entry in entries]
        own = catalogue.study.find_dictionary(request.dictionary) if request.dictionary else catalogue.front()
        refs = sorted(refs, key=lambda ref: (ref != own, ref.site.stream != "image"))[:most]
    if not any(ref.site.stream == "image" for ref in refs):
        raise BadInput("None of these dictionaries is of image tokens. Only those have a place in an image.")
    return refs


def _image(catalogue: Catalogue, ref: DictionaryRef, number: int) -> ImageAnswer:
    rows = _rows(catalogue, ref, number)
    [row] = [row for row in rows if row.id == number]
    return ImageAnswer(
        site=str(ref.site),
        label=ref.label,
        shot=number,
        image=row.image.file,
        width=row.image.width,
        height=row.image.height,
        prompt=row.shot.prompt,
        seed=row.shot.seed,
        steps=row.shot.steps,
        timesteps=[row.shot.timestep for row in rows if row.shot.timestep is not None],
        noise=row.shot.noise if row.shot.image is not None else None,
        grid=catalogue.grid(ref),
        places=_places(catalogue, row.image.file),
    )


def _rows(catalogue: Catalogue, ref: DictionaryRef, number: int) -> list[ShotRow]:
    """Return the shots of a book that are of the same image as one of them, which comes first."""
    with catalogue.book(ref) as book:
        row = book.shots([number]).get(number)
        if row is None:
            raise UnknownName(f"The book of {ref} has no image {number}.")
        return sorted(book.shots_of(row.image.file), key=lambda other: other.id != number)


def _places(catalogue: Catalogue, file: str) -> list[ImagePlace]:
    places = []
    for entry in catalogue.dictionaries():
        if entry.has_book:
            with catalogue.book(catalogue.find(entry.site, entry.label)) as book:
                rows = book.shots_of(file)
            places += [ImagePlace(site=entry.site, label=entry.label, shot=row.id) for row in rows[:1]]
    return places


def _known(catalogue: Catalogue, ref: DictionaryRef, number: int) -> Firing | None:
    """Return what fires in an image by the examples in the book; None for text."""
    rows, grid = _rows(catalogue, ref, number), catalogue.grid(ref)
    if grid is None:
        return None
    with catalogue.book(ref) as book:
        return Firing.of_maps((entry for row in rows for entry in book.packed_maps(row.id)), grid)


def _in_grid(ref: DictionaryRef, firing: Firing | None) -> Firing:
    if firing is None:
        raise BadInput(f"{ref} is of text tokens, which have no place in an image.")
    return firing


def _firing(catalogue: Catalogue, reading: Reading, dictionary: str, step: int) -> tuple[DictionaryRef, Firing]:
    ref = catalogue.study.find_dictionary(dictionary)
    firing = reading.fired.get((ref, step))
    if firing is None:
        read = ", ".join(sorted({str(known) for known, _ in reading.fired}))
        raise UnknownName(f"{ref}, step {step} was not read. There are steps 0 to {len(reading.timesteps) - 1} of {read}.")
    return ref, firing


def _feature(catalogue: Catalogue, ref: DictionaryRef, feature: int | None) -> int | None:
    size = len(catalogue.columns(ref)["peak"])
    if feature is not None and feature >= size:
        raise UnknownName(f"{ref} has no feature {feature}: they are numbered from 0 to {size - 1}.")
    return feature


def _token(firing: Firing, row: int, column: int) -> int:
    rows, columns = firing.grid
    if row >= rows or column >= columns:
        raise BadInput(f"Row {row}, column {column} is outside: the image has {rows} rows and {columns} columns of tokens.")
    return row * columns + column
