"""`FeatureEdits`: edits by features of one or several dictionaries, as arithmetic on features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal, final

from torch import Tensor

from difflex.errors import BadInput
from difflex.explore.workspace import Workspace
from difflex.records import Edit, HookContext, Rectangle, RegionMap, Site
from difflex.steering import SteeringHook, check_origin, steering_hooks
from difflex.values import shown

__all__ = ["Editing", "FeatureEdits", "Half", "Region", "read_region"]

Region = Rectangle | RegionMap | tuple[float, float, float, float] | str
"""(left, top, right, bottom) in fractions of the image, weights of its tokens, the name of a mask image, or `fires`."""
Half = Literal["conditional", "both", "opposed"]
SiteFunction = Callable[[Tensor, HookContext], Tensor | None]


class Editing(ABC):
    """What edits images: `1.5 * feature`, `-feature`, `feature + other`."""

    @abstractmethod
    def edit(self) -> FeatureEdits:
        """Return the edits; a feature is added at its default strength."""

    @abstractmethod
    def times(self, strength: float) -> FeatureEdits:
        """Return the edits at `strength` times theirs; of a feature, at `strength` peaks."""

    def __mul__(self, strength: float) -> FeatureEdits:
        return self.times(float(strength)) if isinstance(strength, int | float) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> FeatureEdits:
        return self.times(-1.0)

    def __add__(self, other: Editing | int) -> FeatureEdits:
        if isinstance(other, Editing):
            return FeatureEdits((*self.edit().parts, *other.edit().parts))
        return self.edit() if other == 0 else NotImplemented  # `sum` begins with 0

    __radd__ = __add__


@final
class FeatureEdits(Editing):
    """Edits by features, for `Model.generate`; `+` combines them, also those of several dictionaries."""

    def __init__(self, parts: Iterable[tuple[Workspace, Edit]]) -> None:
        """Hold edits, each with the study that has its dictionary."""
        self.parts = tuple(parts)

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits as records."""
        return tuple(edit for _, edit in self.parts)

    def edit(self) -> FeatureEdits:
        return self

    def times(self, strength: float) -> FeatureEdits:
        return FeatureEdits((workspace, replace(edit, strength=strength * edit.strength)) for workspace, edit in self.parts)

    def at(self, region: Region | None = None, steps: tuple[int, int] | None = None, half: Half | None = None) -> FeatureEdits:
        """Return the same edits in a region of the image, in a range of steps (its end excluded), or in other halves."""
        given = {"region": read_region(region), "steps": steps, "half": half}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return FeatureEdits((workspace, replace(edit, **changes)) for workspace, edit in self.parts)

    def hooks(self, model: str, revision: str | None) -> list[SteeringHook]:
        """Return the hooks of the edits for a model; a dictionary of another model is refused."""
        parts = [(workspace, edit) for workspace, edit in self.parts if edit.operation != "zero"]
        prepared = [(edit, workspace.editor.features(edit)) for workspace, edit in parts]
        for edit, features in prepared:
            assert features.origin is not None
            check_origin(features.description, features.origin, edit.site, model, revision)
        # `is`, not `==`: edits of two studies may be equal.
        return steering_hooks(self.edits, lambda edit: next(features for own, features in prepared if own is edit))

    def __str__(self) -> str:
        return ", ".join(map(_describe, self.edits))

    def __repr__(self) -> str:
        return f"<edits: {self}>"


def read_region(region: Region | None) -> Rectangle | RegionMap | str | None:
    """Return a region as edits have it."""
    if region is None or isinstance(region, Rectangle | RegionMap | str):
        return region
    if not isinstance(region, tuple | list) or len(region) != 4:
        raise BadInput(
            f"{shown(region)} is not a region. Write (left, top, right, bottom) in fractions of the image, the name of a mask "
            "image, or 'fires'."
        )
    return Rectangle(*region)


def _describe(edit: Edit) -> str:
    features = ", ".join(map(str, edit.features))
    unit = "" if edit.operation == "scale" or edit.unit == "peak" else f" {edit.unit}"
    amount = f"{edit.strength:g}{unit}"
    change = {"add": f"x {amount}", "ablate": "ablated"}.get(edit.operation, f"{edit.operation} {amount}")
    place = "" if edit.region is None else " in a region"
    return f"feature {features} {change}{place}" + ("" if edit.steps is None else f", steps {edit.steps[0]}:{edit.steps[1]}")


Edits = Editing | Iterable[Editing | tuple[Site | str, SiteFunction]]


def read_edits(edits: Edits, model: str, revision: str | None) -> tuple[list[tuple[Site | str, SiteFunction]], str]:
    """Return edits as functions at sites, and in words."""
    items = list(edits) if isinstance(edits, Iterable) else [edits]
    features, hooks = FeatureEdits(()), list[tuple[Site | str, SiteFunction]]()
    for item in items:
        if isinstance(item, Editing):
            features = features + item
        elif isinstance(item, tuple) and len(item) == 2:
            hooks.append(item)
        else:
            raise BadInput(f"{shown(item)} is not an edit. Give features, as in 1.5 * dictionary.feature(7), or a list of them.")
    words = [str(features)] * bool(features.parts) + [f"a function at {site}" for site, _ in hooks]
    return [*features.hooks(model, revision), *hooks], ", ".join(words)
