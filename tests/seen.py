"""Views of plain pictures, for tests of what sees: each of one colour, with a highlight in a corner."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from difflex.book import About, Album, Book, Draft, Example, ExampleKind, FeatureRow, Neighbour, PictureFile, TokenMap
from difflex.explanation import Answers, Asker, Endpoint, Key, Patience, Terms, View
from difflex.records import Shot, Split

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


GRID = (4, 4)


def book(
    folder: Path,
    features: int,
    tops: int = 6,
    sampled: int = 8,
    shared: int = 0,
    colours: Callable[[int], int] = lambda feature: feature,
) -> tuple[Book, Album]:
    """A book whose every feature marks one token of pictures of its own colour, and its album.

    Of each feature `tops` pictures of each split, and `sampled` more of held-out ones; in the first `shared` of these the next
    feature marks another token.
    """
    album, path = Album(folder / "pictures"), folder / "book.sqlite"
    filed = {
        number: album.file(Image.new("RGB", (16, 16), colour(number)))[0] for number in sorted({*map(colours, range(features))})
    }
    about = About(
        dictionary="double.1/topk",
        kind="topk",
        size=features,
        k=1,
        checksum="abc",
        model="m",
        data="plain pictures",
        grid=GRID,
        tokens=1,
        shots={"train": 1, "held-out": 1},
        pictures=len(filed),
    )
    shots: list[tuple[int, int, Shot]] = []
    examples: list[Example] = []
    for feature in range(features):
        runs: list[tuple[ExampleKind, Split, int]] = [("top", "train", tops), ("top", "held-out", tops)]
        runs.append(("quantile", "held-out", sampled))
        rows: list[tuple[ExampleKind, Split, int]] = [(kind, split, rank) for kind, split, count in runs for rank in range(count)]
        for kind, split, rank in rows:
            number, peak = len(shots), 20.0 - rank - 6 * (kind == "quantile") - 0.5 * (split == "train")
            shots.append((number, colours(feature), replace(shot(number), split=split)))
            where = TokenMap((feature % 16,), (peak,))
            examples.append(Example(feature=feature, kind=kind, split=split, rank=rank, shot=number, peak=peak, map=where))
            if kind == "quantile" and rank < shared:
                other, where = (feature + 1) % features, TokenMap(((feature + 5) % 16,), (10.0,))
                examples.append(Example(feature=other, kind=kind, split="train", rank=rank, shot=number, peak=10.0, map=where))
    total = 2 * tops + sampled
    with Draft.of(path, about) as draft:
        draft.pictures(PictureFile(number, *each) for number, each in filed.items())
        draft.shots(shots)
        draft.features(
            FeatureRow(feature=feature, fired=total, shots=total, density=0.01, peak=20.0, mean=5.0)
            for feature in range(features)
        )
        draft.examples(examples)
        for feature in range(features):
            draft.neighbours(feature, [Neighbour((feature + 2) % features, "direction", 0.5)])
    return Book.edit(path), album
