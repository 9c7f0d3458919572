"""`FeatureDictionary` and `Feature`: a dictionary of a study whose features can be searched, looked at and edited."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import SupportsIndex, final, overload

from jaxtyping import Float
from torch import Tensor

from difflex.choices import HighlightStyle, Operation, Unit
from difflex.dictionaries import Dictionary
from difflex.errors import UnknownName
from difflex.evaluation import Evaluation
from difflex.explore.display import Tile, caption, facts, gallery, heading, table
from difflex.explore.edits import Editing, FeatureEdits, Half, Region, read_region
from difflex.explore.images import Pictures
from difflex.explore.search import FoundFeature, search
from difflex.explore.workspace import Workspace
from difflex.features import Book, overlaid
from difflex.features.entries import Example, FeatureStats
from difflex.records import Codes, Edit, Site
from difflex.study import DictionaryRef
from difflex.values import fits, shown

__all__ = ["Feature", "FeatureDictionary", "Features", "found_features"]

TOP = 8
"""Images of a feature that are shown."""
WALL = 12
"""Features that a search shows with an image."""
SIDE = 144
"""Pixels to which the images of small models are enlarged at least."""
FEWEST, SHARED, WORDS = 4, 0.7, 2
"""Top images that a feature must have for its captions to count; by how much of the largest excess over other images they share
a word; and the most words of a label."""
CLEAR = 0.5
"""Average precision from which the best concept of a feature is its label."""


@final
class FeatureDictionary:
    """A dictionary of features of the activations at one site of a model."""

    def __init__(self, workspace: Workspace, ref: DictionaryRef) -> None:
        """Use the dictionary `ref` of a study."""
        self.workspace, self.ref = workspace, ref

    @property
    def name(self) -> str:
        """SITE/LABEL, its name in the study and in commands."""
        return str(self.ref)

    @property
    def site(self) -> Site:
        """Where its activations are read."""
        return self.ref.site

    @cached_property
    def dictionary(self) -> Dictionary:
        """The dictionary itself, with its tensors, on the CPU."""
        return self.workspace.editor.dictionary(self.ref)

    @property
    def size(self) -> int:
        """The number of features."""
        return self.dictionary.size

    @property
    def k(self) -> int:
        """Features per token."""
        return self.dictionary.k

    def encode(self, x: Float[Tensor, "token width"]) -> Codes:
        """Return the codes of activations, strongest feature first, on the device of `x`."""
        return self.dictionary.on(x.device).encode(x)

    def decode(self, codes: Codes) -> Float[Tensor, "token width"]:
        """Reconstruct the activations of `codes`."""
        return self.dictionary.on(codes.values.device).decode(codes)

    def search(self, words: str, limit: int = 10) -> Features:
        """Return the features that fit `words`, best first, by concepts, explanations and the captions of their top images.

        A dictionary without a book gets one first, which takes the model some time, unless a known concept fits.
        """
        has_book, found = self.workspace.has_book(self.ref), list[FoundFeature]()
        if has_book or self.workspace.concepts(self.ref) is not None:
            found = search(self.workspace.study, words, self.ref, limit)
        if not found and not has_book:
            self.workspace.collect([self.ref])
            found = search(self.workspace.study, words, self.ref, limit)
        return found_features(self.workspace, found, words)

    def feature(self, number: int) -> Feature:
        """Return a feature by its number."""
        if not fits(int, number) or not 0 <= number < self.size:
            raise UnknownName(f"{self.name} has no feature {shown(number)}: they are numbered from 0 to {self.size - 1}.")
        return Feature(self, int(number))

    def collect(self, images: int | None = None) -> None:
        """Find where the features fire, in the first `images` of the prompts of its activations (by default 200, or 100)."""
        self.workspace.collect([self.ref], images)

    def evaluate(self, tokens: int = 1_000_000, shots: int = 32) -> Evaluation:
        """Measure reconstruction and sparsity on held-out tokens and, at `shots`, the effect on the model (0 for none)."""
        return self.workspace.evaluate([self.ref], tokens, shots)[self.ref]

    def save(self, folder: Path | str) -> Path:
        """Write the dictionary to a folder, without its study, and return the folder; `difflex.Dictionary.load` reads it."""
        return self.dictionary.save(folder)

    def _facts(self) -> dict[str, object]:
        training, dictionary = self.dictionary.origin.training, self.dictionary
        tokens = training.get("tokens")
        return {
            "kind": dictionary.kind,
            "features": f"{self.size:,}, {self.k} per token",
            "site": f"{self.site} of {self.workspace.study.model}, width {dictionary.width:,}",
            "trained on": f"{tokens:,} tokens" if isinstance(tokens, int) else None,
            "folder": self.workspace.describe_folder(),
        }

    def __repr__(self) -> str:
        return f"<{self.name}: {self.size:,} features of width {self.dictionary.width:,}, {self.k} per token>"

    def _repr_html_(self) -> str:
        html = heading(self.name, "a dictionary") + facts(self._facts())
        if not self.workspace.has_book(self.ref):
            return html + caption("It has no book yet: search(...) or feature(...) makes one.")
        return html + self._best()._repr_html_()

    def _best(self) -> Features:
        """Return some features: of the concepts that are detected best, or else those that cover most of their images."""
        if (concepts := self.workspace.concepts(self.ref)) is not None:
            best = sorted(concepts.by_concept.values(), key=lambda detecting: -detecting.ap)
            return Features([Feature(self, detecting.feature) for detecting in best[:TOP]], "concepts that are detected best")
        with self.workspace.book(self.ref) as book:
            rows = book.features("coverage", descending=True, limit=TOP)
        return Features([Feature(self, row.feature) for row in rows], "features that cover most of their images")


@final
class Feature(Editing):
    """A feature of a dictionary. Times a number it is an edit: `1.5 * feature` adds it at 1.5 times its peak."""

    def __init__(self, dictionary: FeatureDictionary, number: int, reason: str = "") -> None:
        """Use feature `number`, which a search found for a `reason`."""
        self.dictionary, self.number, self.reason = dictionary, number, reason

    @property
    def name(self) -> str:
        """SITE/LABEL and the number."""
        return f"{self.dictionary.name} {self.number}"

    @cached_property
    def stats(self) -> FeatureStats:
        """How often, how strongly and where it fires, in the images of the book."""
        with self.dictionary.workspace.book(self.dictionary.ref) as book:
            return book.feature(self.number)

    @property
    def density(self) -> float:
        """Share of tokens at which it fires."""
        return self.stats.density

    @property
    def peak(self) -> float:
        """Its largest code."""
        return self.stats.peak

    @cached_property
    def label(self) -> str:
        """The known concept that it detects, or else its explanation, or words that captions of its top images share."""
        workspace, ref = self.dictionary.workspace, self.dictionary.ref
        concepts = workspace.concepts(ref)
        best = None if concepts is None else concepts.by_feature.get(self.number)
        if best is not None and best.ap >= CLEAR:
            return f"{best.concept} (AP {best.ap:.2f})"
        if not workspace.has_book(ref):
            return ""
        with workspace.book(ref) as book:
            texts = [entry.text for entry in book.explanations(self.number) if entry.state == "done"]
            return texts[-1] if texts else _shared_words(book, self.examples[:TOP])

    @property
    def examples(self) -> list[Example]:
        """Images in which it fires most strongly, with its map over the tokens, strongest first."""
        with self.dictionary.workspace.book(self.dictionary.ref) as book:
            return sorted(book.examples(self.number, "top"), key=lambda example: -example.peak)

    def images(self, limit: int = TOP, style: HighlightStyle = "outline") -> Pictures:
        """Return the images of its strongest examples, each of another prompt or seed, marked where it fires: outline or blue."""
        return Pictures(tile.image for tile in self._tiles(limit, style))

    def edit(
        self,
        strength: float | None = None,
        operation: Operation = "add",
        unit: Unit = "peak",
        region: Region | None = None,
        steps: tuple[int, int] | None = None,
        half: Half = "conditional",
    ) -> FeatureEdits:
        """Return an edit by this feature, of any kind (see `difflex.Edit`); without a strength, at its default strength."""
        ref, editor = self.dictionary.ref, self.dictionary.workspace.editor
        edit = Edit(operation=operation, site=ref.site, dictionary=ref.label, features=(self.number,), unit=unit, half=half)
        edit = replace(edit, region=read_region(region), steps=steps)
        if strength is None:
            stored = self.stats.strength if self.dictionary.workspace.has_book(ref) else None
            return FeatureEdits([(self.dictionary.workspace, editor.with_default_strength(edit, stored))])
        return FeatureEdits([(self.dictionary.workspace, replace(edit, strength=strength))])

    def times(self, strength: float) -> FeatureEdits:
        return self.edit(strength)

    def _tiles(self, limit: int, style: HighlightStyle = "outline") -> list[Tile]:
        workspace, examples = self.dictionary.workspace, self.examples[:limit]
        with workspace.book(self.dictionary.ref) as book:
            shots, grid = book.shots(example.shot for example in examples), book.about.grid
        tiles = []
        for example in examples:
            row = shots[example.shot]
            image = overlaid(workspace.album.open(row.image.file), example.map, grid, self.peak or 1.0, style=style, side=SIDE)
            tiles.append(Tile(image, row.shot.prompt))
        return tiles

    def __repr__(self) -> str:
        meaning = self.reason or self.label
        return f"<feature {self.number} of {self.dictionary.name}{f': {meaning}' if meaning else ''}>"

    def _repr_html_(self) -> str:
        stats = self.stats
        strength = "" if stats.strength is None else f", default strength {stats.strength:.2g} peaks"
        line = f"fires at {stats.density:.2%} of tokens, peak {stats.peak:.3g}{strength}"
        meaning = self.reason or self.label
        if not stats.firings:
            line = "It fires in none of the images of the book."
        return (
            heading(f"feature {self.number}", self.dictionary.name) + caption(meaning) + caption(line) + gallery(self._tiles(TOP))
        )


def _shared_words(book: Book, examples: Sequence[Example]) -> str:
    """Return the words that the captions of examples share, and captions of other images have rarely; empty if there are none."""
    top = [row.shot.prompt for row in book.shots(example.shot for example in examples).values()]
    every = list({row.image: row.caption for row in book.captions()}.values())
    counts, others = (
        Counter(word for text in texts for word in dict.fromkeys(re.findall(r"\w+", text.lower()))) for texts in (top, every)
    )
    shares = {word: others[word] / len(every) for word in counts}
    excess = {word: (counts[word] / len(top) - share) / (1 - share) for word, share in shares.items() if share < 1}
    words = sorted((word for word in excess if excess[word] >= SHARED), key=lambda word: -excess[word])[:WORDS]
    return f"captions say {' and '.join(words)}" if words and len(top) >= FEWEST else ""


@final
class Features(list[Feature]):
    """Features that a search found, best first."""

    def __init__(self, features: Iterable[Feature], title: str) -> None:
        """Hold `features`, shown under a title."""
        super().__init__(features)
        self.title = title

    @overload
    def __getitem__(self, index: SupportsIndex) -> Feature: ...
    @overload
    def __getitem__(self, index: slice) -> list[Feature]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Feature | list[Feature]:
        if not self and not isinstance(index, slice):
            raise UnknownName(
                f"No feature fits {self.title}. Try another word, collect(...) more images to search in, or train on more tokens."
            )
        return super().__getitem__(index)

    def __repr__(self) -> str:
        lines = [f"{len(self)} features: {self.title}", *(f"  {feature!r}" for feature in self)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        title = heading(self.title, f"{len(self)} features")
        if not self:
            return title
        tiles = [
            Tile(tile.image, f"{feature.number} of {feature.dictionary.name}: {feature.reason or feature.label}".rstrip(": "))
            for feature in self[:WALL]
            for tile in feature._tiles(1)
        ]
        rest = [(feature.number, feature.dictionary.name, feature.reason or feature.label) for feature in self[WALL:]]
        return title + gallery(tiles) + (table(("feature", "dictionary", ""), rest) if rest else "")


def found_features(workspace: Workspace, found: Sequence[FoundFeature], words: str) -> Features:
    """Return the results of a search as features."""
    dictionaries = {each.place: FeatureDictionary(workspace, each.place) for each in found}
    return Features([Feature(dictionaries[each.place], each.feature, each.reason) for each in found], f"'{words}'")
