"""Views of plain pictures, for tests of what sees: each of one colour, with a highlight in a corner."""

from pathlib import Path

import torch
from PIL import Image

from difflex.book import Album, Book
from difflex.explanation import Answers, Asker, Endpoint, Key, Patience, Terms, View
from difflex.records import Shot
from difflex.testing import plain_book, plain_colour

QUICK = Patience(first=0.005, longest=0.02)
MODEL = "rule"


def code(number: int) -> str:
    """The colour as the rule writes it."""
    red, green, blue = plain_colour(number)
    return f"#{red:02x}{green:02x}{blue:02x}"


def shot(number: int) -> Shot:
    return Shot(model="m", prompt=f"picture {number}", pixels=(16, 16), steps=1, guidance=0.0)


def view(number: int) -> View:
    return View(draw=lambda: Image.new("RGB", (16, 16), plain_colour(number)), shot=shot(number), highlight=torch.eye(2))


class Endpoints:
    """Makes askers of endpoints, which it closes at its end."""

    def __init__(self, answers: Answers) -> None:
        self.answers, self._made = answers, list[Endpoint]()

    def __call__(self, url: str, key: str = "", terms: Terms | None = None, timeout: float = 5.0) -> Asker:
        self._made.append(Endpoint(url, MODEL, Key(key, "a test"), timeout=timeout))
        return Asker(self._made[-1], self.answers, terms or Terms(patience=QUICK))

    def close(self) -> None:
        for endpoint in self._made:
            endpoint.close()


def book(folder: Path, features: int, **more: int) -> tuple[Book, Album]:
    """A plain book, to be edited, and its album."""
    return Book.edit(plain_book(folder, features, **more)), Album(folder / "pictures")
