"""`steer`: hooks for edits that name dictionaries and contrasts of a study; and records of edits, to make an image again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar, final

import torch

from difflex.devices import find_device
from difflex.dictionaries import CodeStatistics, Dictionary, DictionaryOrigin, fingerprint
from difflex.errors import BadInput, StaleWork, UnknownName
from difflex.files import file_sha256
from difflex.json_records import JsonRecord
from difflex.records import Edit, Shot, Site, TransplantSource, check_contrast_name
from difflex.steering.contrast import Contrast, contrast_features
from difflex.steering.features import (
    EditFeatures,
    FeatureScales,
    check_origin,
    dictionary_features,
    measure_scales,
    reconstruction,
)
from difflex.steering.hooks import SteeringHook, TransplantMaps, steering_hooks
from difflex.store import Store, require_split
from difflex.study import DictionaryRef, Study

BATCH = 2048
MAX_STEPS, MAX_SIDE = 10_000, 16_384
"""Denoising steps, and pixels on a side, of a recorded image."""
CHUNK = 1024
"""Features whose default strengths are computed at once."""
SourceRun = Callable[[TransplantSource, Site, TransplantMaps], object]
"""Generates the source image of a transplant with its maps as a hook at the site."""


def steer(study: Study, edits: Iterable[Edit], source_run: SourceRun | None = None) -> list[SteeringHook]:
    """Return the hooks of `edits` of the model of `study`, for `Pipeline.generate`; transplants need `source_run`."""
    return StudyEditor(study).steering_hooks(edits, source_run)


@final
class StudyEditor:
    """The dictionaries, scales and contrasts of a study that edits name, each read once."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.dictionary = cache(self._dictionary)
        self.scales = cache(self._scales)
        self.contrast = cache(self._contrast)

    def steering_hooks(self, edits: Iterable[Edit], source_run: SourceRun | None = None) -> list[SteeringHook]:
        """Return the hooks of `edits`, for `Pipeline.generate`."""
        return steering_hooks(edits, self.features, lambda edit: self._maps(edit, source_run))

    def check(self, edits: Iterable[Edit]) -> None:
        """Raise the errors that `steering_hooks` would raise, before an image is drawn."""
        steering_hooks(edits, self.features)

    def features(self, edit: Edit) -> EditFeatures:
        """Return the features that `edit` changes."""
        if edit.dictionary is None and edit.contrast is None:
            raise BadInput(f"The edit at {edit.site} must name a dictionary or a contrast: one of the two.")
        place = DictionaryRef(edit.site, edit.dictionary or "")
        source = self.dictionary(place) if edit.contrast is None else self.contrast(edit.contrast)
        name, origin = source.name, source.origin
        check_origin(name, origin, edit.site, self.study.model, self.study.revision)
        if isinstance(source, Contrast):
            features = contrast_features(source)
        elif edit.operation == "reconstruct":
            features = reconstruction(source)
        else:
            published = CodeStatistics.load(self.study.dictionary(*place)) if edit.has_unit and edit.unit == "mean" else None
            is_measured = edit.has_unit and edit.unit in ("peak", "mean", "norm") and published is None
            features = dictionary_features(source, edit.features, self.scales(place) if is_measured else None)
            if published is not None:
                features = features._replace(units={**features.units, "mean": published.mean[list(edit.features)]})
            features = features._replace(description=f"{place} {', '.join(map(str, edit.features))}")
        return features._replace(origin=replace(origin, model=self.study.model, revision=self.study.revision))

    def with_default_strength(self, edit: Edit, stored: float | None = None) -> Edit:
        """Return `edit` at its default strength in peaks: `stored`, from a book, or the smallest default of its features."""
        if edit.operation == "scale":
            raise BadInput("A scale multiplies codes, and by 1 nothing changes. Name a strength: 0 removes them, 2 doubles them.")
        if edit.dictionary is None or edit.operation not in ("add", "set", "replace"):
            return edit
        if edit.unit != "peak":
            raise BadInput(
                f"The default strength is in peaks, not in units of {edit.unit}. Name a strength, or leave out the unit."
            )
        self.features(edit)  # checks them
        strengths = (
            self.default_strengths(DictionaryRef(edit.site, edit.dictionary), edit.features) if stored is None else [stored]
        )
        return replace(edit, strength=min(strengths))

    def default_strengths(self, place: DictionaryRef, features: Iterable[int] | None = None) -> list[float]:
        """Return the default strengths of features of a dictionary (None: of all), in peaks."""
        dictionary, strengths = self.dictionary(place).on(find_device()), list[float]()
        chosen = torch.arange(dictionary.size) if features is None else torch.tensor(list(features), dtype=torch.long)
        for part in chosen.split(CHUNK):
            decoder = dictionary.decoder_rows(part.to(dictionary.device))
            strengths += self.scales(place).default_strengths(decoder, part).tolist()
        return [round(strength, 3) for strength in strengths]

    def checksums(self, edits: Sequence[Edit]) -> dict[str, str]:
        """Return the checksums of the dictionaries, contrasts and region images that `edits` use, by name."""
        places = {DictionaryRef(edit.site, edit.dictionary) for edit in edits if edit.dictionary is not None}
        checksums = {str(place): fingerprint(self.study.dictionary(*place)) for place in sorted(places)}
        names = {edit.contrast for edit in edits if edit.contrast is not None}
        checksums |= {f"contrast {name}": file_sha256(self.study.contrast(name)) for name in sorted(names)}
        regions = {region for edit in edits for region in (edit.region, edit.source and edit.source.region)}
        images = [region for region in regions if isinstance(region, str) and region != "fires"]
        return checksums | {f"the region {path}": file_sha256(Path(path)) for path in sorted(images) if Path(path).is_file()}

    def _contrast(self, name: str) -> Contrast:
        check_contrast_name(name)
        return Contrast.load(self.study.contrast(name))

    def _dictionary(self, place: DictionaryRef) -> Dictionary:
        return Dictionary.load(self.study.dictionary(*self.study.find_dictionary(str(place))))

    def _scales(self, place: DictionaryRef) -> FeatureScales:
        """Return the scales of a dictionary; measure and store them if the study has none."""
        path, current = self.study.scales(*place), fingerprint(self.study.dictionary(*place))
        stored, stores = FeatureScales.load(path, current), self.study.stores()
        if stored is not None:
            return stored
        if place.site not in stores:
            advice = "Units are measured on them: harvest the site."
            raise UnknownName.among("The activations of", str(place.site), map(str, stores), advice)
        batches = Store.open(stores[place.site]).batches(BATCH, seed=0, split="train")
        scales = measure_scales(self.dictionary(place).on(find_device()), require_split(batches, "train"))
        scales.save(path, current)
        return scales

    def _maps(self, edit: Edit, source_run: SourceRun | None) -> TransplantMaps:
        """Return the maps of a transplant, recorded while its source image is generated."""
        if source_run is None:
            raise BadInput("A transplant generates its source image first. Give `steer` a function that does so.")
        assert edit.source is not None
        maps = TransplantMaps(edit, self.features(edit))
        source_run(edit.source, edit.site, maps)
        return maps


@dataclass(frozen=True, kw_only=True)
class EditRecord(JsonRecord):
    """Edits and the image that they were made for: enough to make it again."""

    FORMAT: ClassVar[int] = 2
    COMMAND: ClassVar[str] = "steer --record"

    shot: Shot
    edits: tuple[Edit, ...]
    checksums: dict[str, str]
    """Of the dictionaries, contrasts and region images, by name."""

    def __post_init__(self) -> None:
        if not self.edits:
            raise BadInput("The record holds no edit.")
        if (
            self.shot.seed < 0
            or not 0 < self.shot.steps <= MAX_STEPS
            or not all(0 < side <= MAX_SIDE for side in self.shot.pixels)
        ):
            raise BadInput(
                f"An image of seed {self.shot.seed}, {self.shot.steps} steps and {self.shot.pixels} pixels cannot be made. Seeds "
                f"are from 0 on, steps from 1 to {MAX_STEPS:,}, and sides from 1 to {MAX_SIDE:,} pixels."
            )

    def check(self, editor: StudyEditor) -> None:
        """Refuse another model, and dictionaries, contrasts and region images that have changed since."""
        study, site = editor.study, self.edits[0].site
        origin = DictionaryOrigin(site=site, model=self.shot.model, revision=self.shot.revision)
        check_origin("The edit", origin, site, study.model, study.revision)
        current = editor.checksums(self.edits)
        changed = [name for name, checksum in self.checksums.items() if current.get(name) != checksum]
        if changed:
            raise StaleWork(f"{changed[0]} has changed since the edit was recorded. Record the edit again.")
