"""`difflex concepts`: the features of a study's dictionaries against concepts that are known by mask."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, final

from tyro.conf import FlagCreatePairsOff, Positional, arg
from tyro.constructors import PrimitiveConstructorSpec

from difflex.commands.flags import Pixels
from difflex.commands.opening import load_studied
from difflex.errors import BadInput, UnknownName
from difflex.evaluation.concepts import (
    Concept,
    ConceptMatches,
    LabelFolder,
    LabelledActivations,
    LabelledImage,
    LabelThresholds,
    keep,
    label,
    painted,
    table,
)
from difflex.miniature import draw
from difflex.miniature.world import CONCEPTS, HELD_OUT_SEEDS
from difflex.records import Activations, Site
from difflex.study import Command, Study

__all__ = ["ConceptsCommand", "drawn_concepts", "drawn_images"]

SCENES = 50
"""Drawn at once."""
DRAWN = HELD_OUT_SEEDS + 10**6
"""The seed of the first scene; mini-flux was trained on none from `HELD_OUT_SEEDS` on."""


def _levels(words: list[str]) -> tuple[float, ...]:
    parts = [part for word in words for part in word.split(",") if part]
    if not parts or not all(re.fullmatch(r"(0(\.\d*)?|\.\d+|1(\.0*)?)", part) for part in parts):
        raise ValueError(f"'{' '.join(words)}' is no list of levels of noise. Write numbers from 0 to 1: 0.25,0.5.")
    return tuple(sorted(set(map(float, parts))))


Levels = Annotated[
    tuple[float, ...],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="LEVEL,...",
        instance_from_str=_levels,
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(each, float) for each in value),
        str_from_instance=lambda value: [",".join(f"{each:g}" for each in value)],
    ),
]
"""Levels of noise between 0 (the image) and 1 (pure noise)."""


class LabelledImages(NamedTuple):
    """Images of which it is known what is where."""

    concepts: tuple[Concept, ...]
    labelled_images: Callable[[], Iterable[LabelledImage]]
    told: str
    """What they are, for the record."""


def drawn_concepts() -> tuple[Concept, ...]:
    """The concepts of the drawn world."""
    return tuple(Concept(name, group) for group, names in CONCEPTS.items() for name in names)


def drawn_images(count: int, first: int = DRAWN) -> Iterator[LabelledImage]:
    """Scenes of the drawn world from the seed `first` on; from there on none was ever trained with."""
    for start in range(first, first + count, SCENES):
        seeds = range(start, min(start + SCENES, first + count))
        scenes = draw(seeds)
        shares = cache(scenes.shares)
        for i, seed in enumerate(seeds):
            yield LabelledImage(
                painted(scenes.images[i]), f"drawn:{seed}", scenes.captions[i], lambda *grid, i=i, of=shares: of(*grid)[i]
            )


@final
@dataclass(frozen=True, kw_only=True)
class ConceptsCommand(Command):
    """Hold features against known concepts: what each detects, how well, and what a linear probe would find there."""

    studies: Annotated[Positional[tuple[Path, ...]], arg(metavar="STUDY...")]
    """Studies with dictionaries; several are shown side by side, as one of an untrained model beside the trained one's."""
    site: Annotated[tuple[str, ...], arg(metavar="SITE...", help_behavior_hint="(default: all that have dictionaries)")] = ()
    """Whose dictionaries: double.18, single.9:update."""
    dictionary: Annotated[tuple[str, ...], arg(metavar="LABEL...", help_behavior_hint="(default: all)")] = ()
    """Which of them, as in topk-2048-k32."""
    images: Annotated[int, arg(metavar="N")] = 1000
    """How many images to look at; a tenth of them is held out, and measured on."""
    noise: Levels = (0.25, 0.5, 0.75)
    """How noisy the images are when the model sees them."""
    folder: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: the drawn world)")] = None
    """Your own images with label maps: FOLDER/images, FOLDER/labels and FOLDER/labels.json."""
    pixels: Annotated[Pixels | None, arg(metavar="HEIGHTxWIDTH", help_behavior_hint="(default: as they are)")] = None
    """Scale and cut the images of a folder to this size."""
    empty_prompts: FlagCreatePairsOff[bool] = False
    """Do not tell the model what is in the images: empty prompts."""
    present_above: Annotated[float, arg(metavar="SHARE")] = 0.5
    """From which share of its area on a token shows a concept."""
    absent_below: Annotated[float, arg(metavar="SHARE")] = 0.0
    """Up to which share it does not; tokens between the two are left out."""
    batch: Annotated[int, arg(metavar="N")] = 32
    """Images at once."""
    precision: Annotated[
        Literal["bf16", "fp16", "fp32", "nf4"] | None, arg(help_behavior_hint="(default: fp32 on a CPU, bf16 on a card)")
    ] = None
    """What the model's weights are held in."""
    offload: FlagCreatePairsOff[bool] = False
    """Keep on the card only the part at work."""
    offline: FlagCreatePairsOff[bool] = False
    """Take models of the hub from the local cache alone."""

    def __call__(self) -> list[Path]:
        if self.images < 1:
            raise BadInput(f"--images {self.images} shows nothing. Ask for 1 or more; a tenth is held out.")
        studies = [Study.open(folder) for folder in self.studies]
        asked = [self._dictionaries(study) for study in studies]
        given = self._given()
        found = {
            path: matches
            for study, folders in zip(studies, asked, strict=True)
            for path, matches in self._judged(study, folders, given).items()
        }
        print(table([*found.values()]))
        return [*found]

    def _dictionaries(self, study: Study) -> dict[Site, dict[str, Path]]:
        """The folders of the dictionaries asked for, by site and label."""
        by_site: dict[Site, dict[str, Path]] = {}
        for place in study.dictionaries():
            by_site.setdefault(place.site, {})[place.label] = study.dictionary(*place)
        if not by_site:
            raise BadInput(f"{study.folder} has no dictionary. Make one with difflex train or difflex itda.")
        for name in self.site:
            if Site.parse(name) not in by_site:
                raise UnknownName.among("The site", name, map(str, by_site), "Train a dictionary there first.")
        wanted = [Site.parse(name) for name in self.site] or list(by_site)
        labels = {name for site in wanted for name in by_site[site]}
        for name in self.dictionary:
            if name not in labels:
                raise UnknownName.among("The dictionary", name, labels, "difflex train makes them.")
        chosen = {
            site: {name: path for name, path in by_site[site].items() if not self.dictionary or name in self.dictionary}
            for site in wanted
        }
        return {site: paths for site, paths in chosen.items() if paths}

    def _given(self) -> LabelledImages:
        if self.folder is None:
            scenes = cache(lambda: list(drawn_images(self.images)))  # small, and long to draw
            return LabelledImages(drawn_concepts(), scenes, f"drawn world from {DRAWN}")
        folder = LabelFolder.open(self.folder)
        return LabelledImages(
            folder.concepts, lambda: folder.labelled_images(self.images, self.pixels), f"folder {folder.fingerprint}"
        )

    def _judged(
        self, study: Study, folders: Mapping[Site, Mapping[str, Path]], given: LabelledImages
    ) -> dict[Path, ConceptMatches]:
        """The matches of a study's dictionaries and of what they must beat; the model is loaded only if some are missing."""
        pipe = cache(lambda: load_studied(study, self.precision, self.offload, self.offline))
        marking = LabelThresholds(shown=self.present_above, absent=self.absent_below)

        def labelled(site: Site) -> LabelledActivations | None:
            if site.kind == "neurons" and "neurons" not in pipe().engine.sites.kinds(site.path, site.stream):
                return None

            def harvest(images: Iterable, prompts: Iterable[str], names: Iterable[str]) -> Iterator[Activations]:
                return pipe().harvest_images(
                    images, self.noise, site, "" if self.empty_prompts else prompts, names, batch=self.batch
                )

            return label(given.labelled_images(), harvest, given.concepts, marking)[site]

        kept = keep(folders, study.concepts, labelled, self._made_from(study, given))
        for each in kept:
            print(f"{study.concepts(each.site, each.label)}: {'made' if each.is_new else 'is there already'}")
        return {study.concepts(each.site, each.label): each.matches for each in kept}

    def _made_from(self, study: Study, given: LabelledImages) -> dict[str, str | int | float]:
        return {
            "model": study.model,
            "revision": study.revision or "",
            "images": given.told,
            "count": self.images,
            "pixels": "x".join(map(str, self.pixels or ())),
            "noise": ",".join(f"{level:g}" for level in self.noise),
            "prompts": "empty" if self.empty_prompts else "told",
            "shown": self.present_above,
            "absent": self.absent_below,
        }
