"""Views of plain images for tests of VLMs: each of one colour, with a highlight in a corner."""

from pathlib import Path

import torch
from PIL import Image

from difflex.explanation import CachedClient, RequestPolicy
from difflex.explanation.answers import AnswerCache
from difflex.explanation.endpoint import ApiKey, EndpointBackend
from difflex.explanation.questions import ImageView
from difflex.features import Book, ImageAlbum
from difflex.records import Shot
from difflex.testing import plain_book, plain_colour

QUICK = RequestPolicy(first_wait=0.005, longest_wait=0.02)
MODEL = "rule"


def code(number: int) -> str:
    """Return the colour of an image in the rule's notation."""
    red, green, blue = plain_colour(number)
    return f"#{red:02x}{green:02x}{blue:02x}"


def shot(number: int) -> Shot:
    return Shot(model="m", prompt=f"image {number}", pixels=(16, 16), steps=1, guidance=0.0)


def view(number: int) -> ImageView:
    return ImageView(draw=lambda: Image.new("RGB", (16, 16), plain_colour(number)), shot=shot(number), highlight=torch.eye(2))


class Endpoints:
    """Clients of endpoints, closed together."""

    def __init__(self, answers: AnswerCache) -> None:
        self.answers, self._backends = answers, list[EndpointBackend]()

    def __call__(self, url: str, key: str = "", policy: RequestPolicy | None = None, timeout: float = 5.0) -> CachedClient:
        self._backends.append(EndpointBackend(url, MODEL, ApiKey(key, "a test"), timeout=timeout))
        return CachedClient(self._backends[-1], self.answers, policy or QUICK)

    def close(self) -> None:
        for endpoint in self._backends:
            endpoint.close()


def book(folder: Path, features: int, **more: int) -> tuple[Book, ImageAlbum]:
    """Return a plain book, open for editing, and its album."""
    return Book.edit(plain_book(folder, features, **more)), ImageAlbum(folder / "images")
