"""`Client`: asks a running `difflex serve`, from a notebook or a script, on this machine or another one."""

from __future__ import annotations

import io
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from typing import Any, NamedTuple, TypeVar, final
from urllib.error import HTTPError, URLError
from urllib.parse import parse_qs, quote, urlencode, urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from PIL import Image
from pydantic import TypeAdapter, ValidationError

from difflex.errors import BadInput, BrokenFile, DifflexError, StaleWork, UnknownName
from difflex.web.answers import DictionaryAnswer, FeatureAnswer, FoundAnswer, TileAnswer, WallAnswer
from difflex.web.guard import COOKIE

PART = 120
"""Tiles of one answer."""
ERRORS: dict[int, type[DifflexError]] = {404: UnknownName, 409: StaleWork, 422: BadInput}
TIMEOUT, PATIENCE = 60.0, 3600.0
"""Seconds without an answer; and without a step of an image, while others have their turn or the model is loaded."""
T = TypeVar("T")


class PaintedImage(NamedTuple):
    """A generated image."""

    seed: int
    factor: float | None
    """By which the strengths of the edits were multiplied; None for the unedited image."""
    image: Image.Image


@final
class Client:
    """Reads a study through `difflex serve`. What the server refuses is raised as an error with its sentence."""

    def __init__(self, url: str, token: str | None = None) -> None:
        """Ask the server at `url`, as `difflex serve` prints it; its token may be in the address, or be given."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise BadInput(
                f"'{url}' is not the address of a server. Give the one that difflex serve prints: http://127.0.0.1:8765/."
            )
        self._root = f"{parts.scheme}://{parts.netloc}"
        token = token or next(iter(parse_qs(parts.query).get("token", [])), None)
        self._headers = {"Accept": "application/json"} | ({"Cookie": f"{COOKIE}={quote(token)}"} if token else {})
        self._name = secrets.token_hex(8)
        self._opener = build_opener(ProxyHandler({}))  # a proxy would not find the address of this machine

    def dictionaries(self) -> list[DictionaryAnswer]:
        """Return the dictionaries of the study, those with a book first."""
        return self._ask(list[DictionaryAnswer], "/api/dictionaries")

    def features(
        self,
        dictionary: str,
        *,
        sort: str = "ap",
        ascending: bool = False,
        where: str | Sequence[str] = (),
        concept: str = "",
        words: str = "",
        like: int | None = None,
    ) -> Iterator[TileAnswer]:
        """Yield the features of a dictionary (SITE/LABEL) as the wall shows them; further ones are requested as they are needed.

        `where` are conditions such as `density<0.01`; `words` and `like` a feature are what the features must fit.
        """
        query: dict[str, object] = {"sort": sort, "ascending": str(ascending).lower(), "concept": concept, "q": words}
        query |= {"where": [where] if isinstance(where, str) else list(where)} | ({} if like is None else {"like": like})
        offset, total = 0, 1
        while offset < total:
            wall = self._ask(WallAnswer, f"{_place(dictionary)}/features", **query, offset=offset, limit=PART)
            yield from wall.tiles
            offset, total = offset + PART, wall.total

    def feature(self, dictionary: str, feature: int) -> FeatureAnswer:
        """Return all that is known of a feature."""
        return self._ask(FeatureAnswer, f"{_place(dictionary)}/features/{feature}")

    def search(self, words: str) -> list[FoundAnswer]:
        """Return the features of all dictionaries that fit `words`, best first."""
        return self._ask(list[FoundAnswer], "/api/search", q=words)

    def image(self, file: str) -> Image.Image:
        """Return an image that an answer names."""
        return self._image(f"/images/{quote(file, safe='')}")

    def generate(
        self,
        prompt: str,
        *,
        seeds: Sequence[int] = (0,),
        edits: Sequence[Mapping[str, object]] = (),
        factors: Sequence[float] = (1.0,),
        steps: int | None = None,
    ) -> Iterator[PaintedImage]:
        """Yield images as they come: that of each seed without the edits, then under them at each factor of their strengths.

        An edit is what /api describes as `EditRequest`: `{"site": ..., "dictionary": ..., "features": [12], "strength": 2.0}`.
        """
        body = {"client": self._name, "prompt": prompt, "seeds": seeds, "edits": edits, "factors": factors, "steps": steps}
        with self._open("/api/generate", json.dumps(body).encode()) as answer:
            for line in answer:
                event = json.loads(line)
                if event["type"] in ("error", "cancelled"):
                    raise DifflexError(event.get("error", "The images were cancelled by a newer request of this client."))
                if event["type"] == "image":
                    yield PaintedImage(event["seed"], event["factor"], self._image(f"/generated/{event['image']}"))

    def _ask(self, kind: type[T], path: str, **query: object) -> T:
        """Return an answer of the server as `kind`."""
        content = self._read(f"{path}?{urlencode(query, doseq=True)}" if query else path)
        try:
            return TypeAdapter(kind).validate_json(content)
        except ValidationError as error:
            raise BrokenFile(
                f"{self._root}{path} does not answer as this version does: {error}. Use the same version."
            ) from error

    def _image(self, target: str) -> Image.Image:
        try:
            return Image.open(io.BytesIO(self._read(target))).convert("RGB")
        except OSError as error:
            raise BrokenFile(f"The image {target} came damaged: {error}. Ask again.") from error

    def _read(self, target: str) -> bytes:
        with self._open(target) as answer:
            return answer.read()

    @contextmanager
    def _open(self, target: str, body: bytes | None = None) -> Iterator[HTTPResponse]:
        """Send a request, with a body as JSON, and open the answer; what the server refuses is raised with its sentence."""
        headers = self._headers | ({"Content-Type": "application/json"} if body is not None else {})
        timeout = TIMEOUT if body is None else PATIENCE
        try:
            with self._opener.open(Request(self._root + target, body, headers), timeout=timeout) as answer:
                yield answer
        except HTTPError as error:
            with error:
                raise ERRORS.get(error.code, DifflexError)(_sentence(error.read())) from None
        except (URLError, HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)
            raise BadInput(f"{self._root} does not answer: {reason}. Begin the server there: difflex serve STUDY.") from error


def _place(dictionary: str) -> str:
    site, _, label = dictionary.partition("/")
    return f"/api/dictionaries/{quote(site, safe='')}/{quote(label, safe='')}"


def _sentence(content: bytes) -> str:
    """Return what the server says is wrong."""
    try:
        answer: Any = json.loads(content)
        return str(answer["error"])
    except (ValueError, KeyError, TypeError):
        return content.decode(errors="replace")[:500] or "The server refused without a reason."
