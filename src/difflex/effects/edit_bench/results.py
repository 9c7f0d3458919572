"""The results of the editing benchmark: scores of images, records of items and of the whole, and their tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, final

import torch

from difflex.effects.edit_bench.items import EDIT_TYPES, EditItem, EditType, Images, Mask
from difflex.effects.edit_bench.transfer import METHODS, Method
from difflex.effects.inputs import Provenance, check_images
from difflex.errors import BadInput
from difflex.evaluation import ClipModel
from difflex.explanation.comparison import MeanEstimate, estimate_mean
from difflex.json_records import JsonRecord
from difflex.tables import text_table
from difflex.values import check_fields

NONE, PROMPT = "none", "prompt"
"""The references: no edit, and the edited prompt."""
ALL = "all"
"""All edit types together."""
Scores = Mapping[str, float]


@final
@dataclass(frozen=True, kw_only=True)
class EditBenchConfig:
    """Which edits are made, by which representations, and how they are scored."""

    types: tuple[EditType, ...] = EDIT_TYPES
    count: int = 8
    """Items of each type."""
    dictionaries: tuple[str, ...] = ()
    """SITE/LABEL, or several joined by commas that are edited together.

    Empty for the largest of each kind at each site, each alone and those of a kind together.
    """
    sites: tuple[str, ...] = ()
    """Sites of activations, contrasts and neurons, or several joined by commas; empty for those of the dictionaries."""
    methods: tuple[Method, ...] = METHODS
    features: tuple[int, ...] = (16, 64)
    """Features that are added, and that are removed."""
    neurons: tuple[int, ...] = (64, 256)
    """The same for neurons."""
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0)
    """What is added and removed is multiplied by these."""
    pairs: int = 4
    """Pairs of images, with other seeds, that the direction of a contrast is found on."""
    clip: str | None = None
    """Folder or hub name of a CLIP of transformers; None for none."""
    lpips: bool = False
    """Whether LPIPS is measured."""

    def __post_init__(self) -> None:
        check_fields(self)
        numbers = (self.count, self.pairs, *self.features, *self.neurons)
        if not (self.types and self.methods and self.features and self.neurons and self.strengths) or min(numbers) < 1:
            raise BadInput("A benchmark needs one or more items, types, methods, numbers of features and strengths.")
        settings = len(self.strengths) * (len(self.features) + len(self.neurons) + 2)
        check_images(len(self.types) * self.count * (settings + 2 * self.pairs))


class EditArm(NamedTuple):
    """A way to edit: what is transferred, at which sites, how much of it and how strongly."""

    method: str
    """`features`, `neurons`, `activations` or `contrast`; `none` and `prompt` are references."""
    place: str = ""
    """The dictionaries or sites; empty for references."""
    features: int | None = None
    """How many features or neurons are added, and how many removed; None for all that there is."""
    strength: float = 1.0

    def __str__(self) -> str:
        count = "" if self.features is None else f", {self.features}"
        return f"{self.method} {self.place}{count}, strength {self.strength:g}" if self.place else self.method


REFERENCES = EditArm(NONE), EditArm(PROMPT)


@final
@dataclass(frozen=True, kw_only=True)
class EditedItem(JsonRecord):
    """The scores of an item under every arm."""

    FORMAT: ClassVar[int] = 1
    COMMAND: ClassVar[str] = "edit-bench"

    key: str
    """A checksum of all that the scores depend on."""
    item: EditItem
    scores: dict[str, dict[str, float]]
    """By arm and measure. The sheet of images beside the file has a tile for each arm in this order."""
    sheet: str
    """SHA-256 of the sheet."""


@final
@dataclass(frozen=True, kw_only=True)
class EditCell:
    """The mean scores of an arm on the items of a type."""

    type: str
    """An edit type, or `all`."""
    arm: EditArm
    measures: dict[str, MeanEstimate]
    """By name, with bootstrap intervals over items."""


@final
@dataclass(frozen=True, kw_only=True)
class EditBenchResults(JsonRecord):
    """The results of all arms on all items."""

    FORMAT: ClassVar[int] = 1
    COMMAND: ClassVar[str] = "edit-bench"
    INDENT: ClassVar[int | None] = None

    model: str
    world: str
    """`drawn`, or the name of the file of the items."""
    items: int
    cells: tuple[EditCell, ...]
    config: EditBenchConfig
    provenance: Provenance

    @property
    def types(self) -> list[str]:
        """The edit types that have items."""
        return list(dict.fromkeys(cell.type for cell in self.cells if cell.type != ALL))

    @property
    def all_arms(self) -> list[EditArm]:
        """All arms, the references first."""
        return [cell.arm for cell in self.cells if cell.type == ALL]

    @property
    def is_judged(self) -> bool:
        """Whether a judge said if edits succeed."""
        return any("success" in cell.measures for cell in self.cells)

    def cell(self, type: str, arm: EditArm) -> EditCell | None:
        """Return the scores of an arm on the items of a type, if there are any."""
        return next((cell for cell in self.cells if cell.type == type and cell.arm == arm), None)

    def arms(self, method: str, place: str) -> list[EditArm]:
        """Return the arms of a method at a place."""
        return [arm for arm in self.all_arms if (arm.method, arm.place) == (method, place)]

    def best_arms(self) -> list[EditArm]:
        """Return the references, and for each method and place the arm with the highest mean score over all items."""
        places = dict.fromkeys((cell.arm.method, cell.arm.place) for cell in self.cells)
        best = (max(self.arms(*place), key=lambda arm: self.value(ALL, arm, "score") or 0.0) for place in places)
        return list(best)

    def value(self, type: str, arm: EditArm, measure: str) -> float | None:
        """Return a mean; None where it was not measured."""
        cell = self.cell(type, arm)
        estimate = cell.measures.get(measure) if cell else None
        return None if estimate is None else estimate.value


def summarise(items: Sequence[EditedItem], arms: Sequence[EditArm]) -> tuple[EditCell, ...]:
    """Return the mean scores of all arms on the items of each type, and on all."""
    types = [kind for kind in EDIT_TYPES if any(entry.item.type == kind for entry in items)]
    cells = []
    for kind in (ALL, *types):
        own = [entry for entry in items if kind in (ALL, entry.item.type)]
        for arm in arms:
            rows = [entry.scores[str(arm)] for entry in own]
            names = dict.fromkeys(name for row in rows for name in row)
            measures = {name: estimate_mean([row[name] for row in rows if name in row]) for name in names}
            cells.append(EditCell(type=kind, arm=arm, measures=measures))
    return tuple(cells)


class ImageScorer:
    """Scores images by their pixels, and by CLIP and LPIPS where they are given."""

    def __init__(self, clip: ClipModel | None, lpips: Callable[[Images, Images], torch.Tensor] | None) -> None:
        self._clip, self._lpips = clip, lpips

    def __call__(
        self, items: Sequence[EditItem], changed: Sequence[Mask], sources: Images, targets: Images, edited: Images
    ) -> list[dict[str, float]]:
        """Return the scores of the edited images of items; `changed` are the pixels that may change."""
        rows = [_pixel_scores(*parts) for parts in zip(changed, sources, targets, edited, strict=True)]
        columns: dict[str, Iterable[float]] = {}
        if self._clip is not None:
            image = self._clip.embed_images(edited)
            before = self._clip.embed_images(sources)
            wanted = self._clip.embed_texts([item.target for item in items])
            columns["clip target"] = (image * wanted).sum(1).tolist()
            columns["clip gain"] = ((image - before) * wanted).sum(1).tolist()
            columns["clip source"] = (image * self._clip.embed_texts([item.source for item in items])).sum(1).tolist()
            columns["clip image source"] = (image * before).sum(1).tolist()
            columns["clip image target"] = (image * self._clip.embed_images(targets)).sum(1).tolist()
        if self._lpips is not None:
            columns["lpips source"] = self._lpips(edited, sources).tolist()
            columns["lpips target"] = self._lpips(edited, targets).tolist()
        for name, values in columns.items():
            for row, value in zip(rows, values, strict=True):
                row[name] = value
        return rows


def _pixel_scores(changed: Mask, source: torch.Tensor, target: torch.Tensor, edited: torch.Tensor) -> dict[str, float]:
    """Return `outside`, the mean change where nothing should, and `toward`, the share of the way to the reference inside."""
    difference, way = (edited - source).abs().mean(0), (target - source).abs().mean(0)[changed].sum()
    scores = {"outside": float(difference[~changed].mean())} if bool((~changed).any()) else {}
    if float(way) > 0:
        scores["toward"] = float(1 - (edited - target).abs().mean(0)[changed].sum() / way)
    return scores


def with_score(scores: dict[str, float]) -> dict[str, float]:
    """Return scores with `score`, by which settings are compared: success times kept, else the gain of CLIP, else toward."""
    if "success" in scores:
        return {**scores, "score": scores["success"] * scores["kept"]}
    return {**scores, "score": scores.get("clip gain", scores.get("toward", 0.0))}


SHOWN = ("success", "kept", "clip gain", "clip target", "lpips source", "outside", "toward")
"""Measures of the table, where they were measured."""


def edit_bench_table(results: EditBenchResults) -> str:
    """Return two text tables: each method and place at its best setting, and its score by edit type."""
    best = results.best_arms()
    names = [name for name in SHOWN if any(results.value(ALL, arm, name) is not None for arm in best)]
    head, rows = ("method", "at", "features", "strength"), []
    by_type = [(*head[:2], *results.types)]
    for arm in best:
        cell = results.cell(ALL, arm)
        assert cell is not None, "the best arm of a place has results"
        own = [_number(results.value(ALL, arm, name)) for name in names]
        score = cell.measures["score"]
        settings = ("" if arm.features is None else str(arm.features), f"{arm.strength:g}" if arm.place else "")
        rows.append((arm.method, arm.place, *settings, *own, f"{score.value:.2f} ({score.low:.2f} to {score.high:.2f})"))
        by_type.append((arm.method, arm.place, *(_number(results.value(kind, arm, "score")) for kind in results.types)))
    first = text_table([(*head, *names, "score (95 %)"), *rows], right_align=range(2, 4 + len(names)))
    second = text_table(by_type, right_align=range(2, len(by_type[0])))
    return f"{first}\n\nScore by edit type:\n{second}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if abs(value) >= 0.1 or not value else f"{value:.3f}"


def sheet_path(folder: Path, item: EditItem) -> Path:
    """Return the file with the images of an item."""
    return folder / f"{item.id}.webp"
