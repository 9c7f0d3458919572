"""`steer`: edits resolved by what a study holds; and edits written down, to be made again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, final

import torch

from difflex.dictionaries import Dictionary, fingerprint
from difflex.errors import BadInput, BrokenFile, StaleWork, UnknownName
from difflex.files import file_sha256, write_json
from difflex.records import Edit, Rectangle, Shot, Site, TransplantSource, of_split
from difflex.steering.contrast import Contrast
from difflex.steering.editing import EditFeatures, SteeringHook, check_maker, features_of, steered_along, steerings
from difflex.steering.maps import TransplantMaps
from difflex.steering.scales import FeatureScales, scales_of
from difflex.store import Store
from difflex.study import DictionaryRef, Study

__all__ = ["Draw", "EditRecord", "StudyEditor", "steer"]

FORMAT = 1
BATCH = 2048
AT_ONCE = 1024
"""Features whose strengths are weighed at once."""
Draw = Callable[[TransplantSource, Site, TransplantMaps], object]
"""Draws the source of a transplant while its maps are read at the site."""


def steer(study: Study, edits: Iterable[Edit], draw: Draw | None = None) -> list[SteeringHook]:
    """`edits` of the model of `study`, for `Pipeline.generate`; `draw` is needed for transplants alone."""
    return StudyEditor(study).steerings(edits, draw)


@final
class StudyEditor:
    """What edits are made with: the dictionaries, units and contrasts of a study, each read once."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.dictionary = cache(self._dictionary)
        self.scales = cache(self._scales)
        self.contrast = cache(lambda name: Contrast.load(study.contrast(name)))

    def steerings(self, edits: Iterable[Edit], draw: Draw | None = None) -> list[SteeringHook]:
        """What `Pipeline.generate` makes of `edits`."""
        return steerings(edits, self.features, lambda edit: self._maps(edit, draw))

    def features(self, edit: Edit) -> EditFeatures:
        """What `edit` is about."""
        if (edit.dictionary is None) == (edit.contrast is None):
            raise BadInput(f"The edit at {edit.site} must name a dictionary or a contrast: one of the two.")
        if edit.contrast is not None:
            found = self.contrast(edit.contrast)
            if found.site != edit.site:
                raise StaleWork(f"The contrast '{edit.contrast}' is at {found.site}, the edit at {edit.site}. Edit {found.site}.")
            self._is_of_model(f"The contrast '{edit.contrast}'", found.model, found.revision)
            return steered_along(found)
        place = DictionaryRef(edit.site, edit.dictionary or "")
        dictionary = self.dictionary(place)
        check_maker(dictionary, edit.site, self.study.model, self.study.revision)
        return features_of(dictionary, edit.features, self.scales(place))

    def default_strength(self, edit: Edit) -> float:
        """The strength, in peaks, that an edit has where none is named: the least of its features' own."""
        place, chosen = DictionaryRef(edit.site, edit.dictionary or ""), torch.tensor(edit.features, dtype=torch.long)
        self.features(edit)  # says what is wrong with them
        return round(float(self.scales(place).default_strengths(self.dictionary(place).decoder_of(chosen), chosen).min()), 3)

    def default_strengths(self, place: DictionaryRef) -> list[float]:
        """The same of every feature of a dictionary."""
        dictionary, found = self.dictionary(place), list[float]()
        for some in torch.arange(dictionary.size).split(AT_ONCE):
            found += (
                self.scales(place).default_strengths(dictionary.decoder_of(some.to(dictionary.constant.device)), some).tolist()
            )
        return [round(strength, 3) for strength in found]

    def _dictionary(self, place: DictionaryRef) -> Dictionary:
        if place not in self.study.dictionaries():
            known = map(str, self.study.dictionaries())
            raise UnknownName.among("The dictionary", str(place), known, "difflex train and difflex itda make dictionaries.")
        return Dictionary.load(self.study.dictionary(*place))

    def _scales(self, place: DictionaryRef) -> FeatureScales:
        """The scales of a dictionary: from the study, or from its activations and then kept there."""
        path, now = self.study.scales(*place), fingerprint(self.study.dictionary(*place))
        kept, stores = FeatureScales.kept(path, now), self.study.stores()
        if kept is not None:
            return kept
        if place.site not in stores:
            raise UnknownName.among(
                "The activations of", str(place.site), map(str, stores), "Harvest them: units come from there."
            )
        batches = Store.open(stores[place.site]).batches(BATCH, seed=0, split="train")
        made = scales_of(self.dictionary(place), of_split(batches, "train"))
        made.save(path, now)
        return made

    def _maps(self, edit: Edit, draw: Draw | None) -> TransplantMaps:
        """The maps that a transplant takes over, read while its source is drawn."""
        if draw is None:
            raise BadInput("A transplant draws its source first. Give `steer` a function that does it.")
        assert edit.source is not None
        maps = TransplantMaps(edit, self.features(edit).codes)
        draw(edit.source, edit.site, maps)
        return maps

    def _is_of_model(self, what: str, model: str, revision: str | None) -> None:
        if (model, revision) != (self.study.model, self.study.revision):
            raise StaleWork(f"{what} was made for {model}@{revision}, the model is {self.study.model}@{self.study.revision}.")

    def checksums(self, edits: Iterable[Edit]) -> dict[str, str]:
        """Of the files that `edits` are made with, by their names in the study."""
        folders = {str(DictionaryRef(edit.site, edit.dictionary)): edit for edit in edits if edit.dictionary is not None}
        found = {name: fingerprint(self.study.dictionary(edit.site, edit.dictionary or "")) for name, edit in folders.items()}
        names = {edit.contrast for edit in edits if edit.contrast is not None}
        found |= {f"contrast {name}": file_sha256(self.study.contrast(name)) for name in sorted(names)}
        regions = {where for edit in edits for where in (edit.region, edit.source and edit.source.region)}
        painted = [where for where in regions if isinstance(where, str) and where != "fires"]
        return found | {f"the region {path}": file_sha256(Path(path)) for path in sorted(painted) if Path(path).is_file()}


@dataclass(frozen=True, kw_only=True)
class EditRecord:
    """Edits as they were made, and the image they were made for: enough to make it again."""

    shot: Shot
    edits: tuple[Edit, ...]
    checksums: dict[str, str]
    """Of the dictionaries and contrasts, by name."""

    def save(self, path: Path) -> Path:
        """`path`, which now holds the edits as JSON."""
        edits = [{**asdict(edit), "site": str(edit.site)} for edit in self.edits]
        try:
            return write_json(path, FORMAT, {"shot": asdict(self.shot), "edits": edits, "checksums": self.checksums})
        except OSError as error:
            raise BadInput(f"The edit cannot be written to {path}: {error}. Name a file that you may write.") from error

    @classmethod
    def load(cls, path: Path) -> EditRecord:
        """The edits in `path`."""
        try:
            said = json.loads(path.read_bytes())
            if said["format"] != FORMAT:
                raise BrokenFile(f"{path} is of format {said['format']!r}; this difflex reads format {FORMAT}.")
            shot = Shot(**{**said["shot"], "pixels": tuple(said["shot"]["pixels"])})
            return cls(shot=shot, edits=tuple(map(_edit, said["edits"])), checksums=said["checksums"])
        except FileNotFoundError as error:
            raise BadInput(f"There is no {path}. difflex steer --record writes one.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise BrokenFile(f"{path} is not an edit ({error}): it is damaged. Record it again.") from error

    def check(self, toolbox: StudyEditor) -> None:
        """Nothing; dictionaries or contrasts that have changed since are refused."""
        now = toolbox.checksums(self.edits)
        changed = [name for name, digits in self.checksums.items() if now.get(name) != digits]
        if changed:
            raise StaleWork(f"{changed[0]} has changed since the edit was recorded. Record the edit again.")


def _edit(said: dict[str, Any]) -> Edit:
    source = said["source"] and TransplantSource(**{**said["source"], "region": _region(said["source"]["region"])})
    steps = said["steps"] and tuple(said["steps"])
    made = {"site": Site.parse(said["site"]), "features": tuple(said["features"]), "region": _region(said["region"])}
    return Edit(**{**said, **made, "steps": steps, "source": source})


def _region(said: str | Sequence[float] | None) -> Rectangle | str | None:
    return said if said is None or isinstance(said, str) else Rectangle(*said)
