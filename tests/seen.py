"""Views of plain pictures, for tests of what sees: each of one colour, with a highlight in a corner."""

import torch
from PIL import Image

from difflex.explanation import Answers, Asker, Endpoint, Key, Patience, Terms, View
from difflex.records import Shot

QUICK = Patience(first=0.005, longest=0.02)
MODEL = "rule"


def colour(number: int) -> tuple[int, int, int]:
    """A colour of its own for each number."""
    return (number * 37 % 256, number // 7 % 256, number * 91 % 256)


def code(number: int) -> str:
    """The colour as the rule writes it."""
    red, green, blue = colour(number)
    return f"#{red:02x}{green:02x}{blue:02x}"


def shot(number: int) -> Shot:
    return Shot(model="m", prompt=f"picture {number}", pixels=(16, 16), steps=1, guidance=0.0)


def view(number: int) -> View:
    return View(draw=lambda: Image.new("RGB", (16, 16), colour(number)), shot=shot(number), highlight=torch.eye(2))


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
