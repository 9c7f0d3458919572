"""`difflex removal`: take a concept's features away and see, on prompts not met before, what is gone and what is left."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean
from typing import Annotated, final

from PIL import Image
from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex import effects
from difflex.commands.flags import Numbers, Range, Strengths
from difflex.commands.inputs import load_study_model
from difflex.dictionaries import Dictionary
from difflex.effects import GenerationCodes, JudgeVerdict, RemovalImages, RemovedConcept, best_of
from difflex.effects.trials import NAMED, DrawnJudge, NamedCaption, as_tensor, drawn_naming
from difflex.errors import BadInput, UnknownName
from difflex.miniature import load_judge
from difflex.pipeline import Pipeline
from difflex.records import Edit, Shot, Site
from difflex.steering import SteeringHook, StudyEditor, check_origin
from difflex.study import Command, DictionaryRef, Study

__all__ = ["RemovalCommand"]

BATCH = 32
APART = 10**6
"""How far the seeds of one set of images are from those of the next."""
Together = tuple[DictionaryRef, ...]
"""Dictionaries whose features are edited at once."""


@final
@dataclass(frozen=True, kw_only=True)
class RemovalCommand(Command):
    """Remove known concepts by their features, and judge on unseen prompts what is gone and what else is lost.

    Features are chosen step by step by the score of SAeUron on one set of prompts, their number and strength on another one,
    where several are given; a third is judged.
    """

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study of a model of the drawn world."""
    dictionary: Annotated[
        Positional[tuple[str, ...]], arg(metavar="DICTIONARY...", help_behavior_hint="(default: each label at all its sites)")
    ] = ()
    """Which: SITE/LABEL, or the site alone where it has one dictionary; with commas between them, several at once."""
    groups: Annotated[tuple[str, ...], arg(metavar="GROUP...")] = ("colour", "background")
    """The concepts of which groups."""
    images: Annotated[int, arg(metavar="N")] = 24
    """Prompts that name each concept, to judge by."""
    selection_images: Annotated[int, arg(metavar="N")] = 12
    """Others that name each concept, to choose features by."""
    tuning_images: Annotated[int, arg(metavar="N")] = 12
    """Others still, to choose the number of features and the strength by."""
    features: Numbers = (1, 2, 4, 8)
    """How many features go at each step and site."""
    strength: Strengths = (0.5, 0.0, -1.0, -2.0, -4.0)
    """What their codes are multiplied by: 0 takes them away, less writes the opposite."""
    edit_steps: Annotated[Range | None, arg(help_behavior_hint="(default: all)")] = None
    """At which denoising steps; END is left out."""
    offload: FlagCreatePairsOff[bool] = False
    """Keep on the card only the part at work."""

    def __call__(self) -> list[Path]:
        self._check()
        toolbox = StudyEditor(Study.open(self.study))
        sets = self._sets(toolbox)
        known = {together: known for together in sets if (known := self._known(toolbox, together)) is not None}
        made = self._made(toolbox, [together for together in sets if together not in known])
        for together in sets:
            removal = made.get(together) or known[together]
            print(f"{_named(together)}{'' if together in made else ': as before'}\n{_table(removal)}")
        return [toolbox.study.removal(together) for together in sets]

    def _known(self, toolbox: StudyEditor, together: Together) -> effects.RemovalResults | None:
        """What came of it when it was done just so before."""
        path = toolbox.study.removal(together)
        known = effects.RemovalResults.load(path) if path.is_file() else None
        return known if known and known.made_from == self._made_from(toolbox, together) else None

    def _made(self, toolbox: StudyEditor, sets: Sequence[Together]) -> Mapping[Together, effects.RemovalResults]:
        """What comes of these sets, written down."""
        if not sets:
            return {}
        pipe = load_study_model(toolbox.study, None, self.offload, offline=False)
        next(pipe.shots("", keep_steps=self.edit_steps))  # steps that the run does not have are refused
        studio = _RemovalGenerator(pipe, {place: toolbox.dictionary(place) for together in sets for place in together})
        removed: dict[Together, list[RemovedConcept]] = {together: [] for together in sets}
        for group in self.groups:
            scouted, tried_on, unseen = studio.apart(group, (self.selection_images, self.tuning_images, self.images))
            for together in sets:
                print(f"{_named(together)}: {group}", flush=True)
                for each in self._removed(scouted(together), tried_on(together), unseen(together), group, together):
                    print(_told(each), flush=True)
                    removed[together].append(each)
        return {together: self._written(toolbox, together, concepts) for together, concepts in removed.items()}

    def _check(self) -> None:
        for group in self.groups:
            if group not in NAMED:
                raise UnknownName.among("The group", group, NAMED)
        if min(self.images, self.selection_images, self.tuning_images) < 1 or not self.features or not self.groups:
            raise BadInput(
                f"--images {self.images} --selection-images {self.selection_images} --tuning-images {self.tuning_images} with {len(self.features)} "
                f"numbers of --features and {len(self.groups)} --groups leave nothing to remove. Ask for 1 or more of each."
            )
        if max(self.strength) >= 1:
            raise BadInput(f"A strength of {max(self.strength):g} takes nothing away: codes are multiplied by it. Stay below 1.")

    def _sets(self, toolbox: StudyEditor) -> list[Together]:
        """Which dictionaries are edited at once."""
        study = toolbox.study
        if self.dictionary:
            sets = [tuple(study.find_dictionary(name) for name in each.split(",")) for each in self.dictionary]
        else:
            known = [place for place in study.dictionaries() if place.site.kind != "neurons"]
            labels = dict.fromkeys(place.label for place in known)
            sets = [tuple(place for place in known if place.label == label) for label in labels]
        if not sets:
            raise BadInput(f"{self.study} holds no dictionary. difflex train and difflex itda make them.")
        for place in dict.fromkeys(place for together in sets for place in together):
            check_origin(toolbox.dictionary(place), place.site, study.model, study.revision)
        return list(dict.fromkeys(sets))

    def _removed(
        self, scouted: RemovalImages, tried_on: RemovalImages, unseen: RemovalImages, group: str, together: Together
    ) -> Iterator[RemovedConcept]:
        """Each concept of a group, removed by what was chosen on the first two sets of images, judged on the third."""
        for concept in dict.fromkeys(scouted.named):
            cuts = scouted.chosen(concept, max(self.features), self.edit_steps)
            settings = [(number, strength) for number in self.features for strength in self.strength]
            tried = tuple(tried_on.tried(concept, cuts, settings)) if len(settings) > 1 else ()
            number, strength = best_of(tried)[:2] if tried else settings[0]
            cuts = [cut.of(number) for cut in cuts]
            own = [seen.shows for name, seen in zip(unseen.named, unseen.before, strict=True) if name == concept]
            yield RemovedConcept(
                concept=concept,
                group=group,
                features={str(place): cut.features for place, cut in zip(together, cuts, strict=True)},
                strength=strength,
                tried=tried,
                images=len(own),
                shown=fmean(own),
                rates=unseen.rates(concept, cuts, strength),
            )

    def _written(self, toolbox: StudyEditor, together: Together, concepts: Sequence[RemovedConcept]) -> effects.RemovalResults:
        removal = effects.RemovalResults(
            model=toolbox.study.model,
            dictionaries=tuple(map(str, together)),
            concepts=tuple(concepts),
            made_from=self._made_from(toolbox, together),
        )
        removal.save(toolbox.study.removal(together))
        return removal

    def _made_from(self, toolbox: StudyEditor, together: Together) -> Mapping[str, str | int]:
        edits = [Edit(operation="scale", site=place.site, dictionary=place.label) for place in together]
        return {
            **toolbox.checksums(edits),
            "groups": ",".join(self.groups),
            "images": self.images,
            "chosen_by": self.selection_images,
            "tried_on": self.tuning_images,
            "features": ",".join(map(str, self.features)),
            "strength": ",".join(f"{strength:g}" for strength in self.strength),
            "steps": "all" if self.edit_steps is None else f"{self.edit_steps.start}:{self.edit_steps.stop}",
        }


@final
class _RemovalGenerator:
    """Where images are drawn and looked at."""

    def __init__(self, pipe: Pipeline, dictionaries: Mapping[DictionaryRef, Dictionary]) -> None:
        self._pipe, self._dictionaries, self._judge = pipe, dictionaries, DrawnJudge(load_judge())

    def apart(self, group: str, counts: Sequence[int]) -> list[Callable[[Together], RemovalImages]]:
        """Sets of images, so many for each concept, for any of the dictionaries; they share no caption and no seed."""
        captions, ends = drawn_naming(group, sum(counts)), [0, *accumulate(counts)]
        parts = [[one for each in captions for one in each[start:end]] for start, end in pairwise(ends)]
        return [self._unedited(group, part, number * APART) for number, part in enumerate(parts)]

    def _unedited(self, group: str, named: Sequence[NamedCaption], first_seed: int) -> Callable[[Together], RemovalImages]:
        """The images of captions, for any of the dictionaries."""
        firings = {place: GenerationCodes(dictionary) for place, dictionary in self._dictionaries.items()}
        shots = [shot for seed, each in enumerate(named, first_seed) for shot in self._shots(each.caption, seed)]
        before = self._seen(group, named, shots, [place.site for place in firings], firings)

        def edited(numbers: Sequence[int], edits: Sequence[SteeringHook]) -> list[JudgeVerdict]:
            with ExitStack() as edited:
                for site, change in edits:
                    edited.enter_context(self._pipe.at(site, change))
                return self._seen(group, [named[i] for i in numbers], [shots[i] for i in numbers], [edits[0].site], {})

        concepts = tuple(each.concept for each in named)
        return lambda together: RemovalImages(
            named=concepts, before=tuple(before), firings=tuple(firings[place] for place in together), edited=edited
        )

    def _shots(self, caption: str, seed: int) -> Iterator[Shot]:
        return (replace(shot, timestep=None) for shot in self._pipe.shots(caption, seeds=[seed], keep_steps=[0]))

    def _seen(
        self,
        group: str,
        named: Sequence[NamedCaption],
        shots: Sequence[Shot],
        sites: Sequence[Site],
        firings: Mapping[DictionaryRef, GenerationCodes],
    ) -> list[JudgeVerdict]:
        """What the judge sees of the images; how features fire on the way is added to `firings`."""
        drawn: list[Image.Image] = []
        for images, activations in self._pipe.harvest_with_images(shots, list(dict.fromkeys(sites)), BATCH):
            drawn += images
            for seen in activations:
                for place in [place for place in firings if place.site == seen.site]:
                    firings[place].add(seen)
        return self._judge.of_named(group, named, as_tensor(drawn))


def _named(together: Together) -> str:
    return ", ".join(map(str, together))


def _told(each: RemovedConcept) -> str:
    """A line of the table."""
    rates = each.rates
    return f"{each.concept:<12}{each.each:>8}{each.strength:>10g}" + "".join(
        f"{100 * rate:>7.0f}" for rate in (rates.ua, rates.ira, rates.cra, rates.own)
    )


def _table(removal: effects.RemovalResults) -> str:
    """A line for each concept, and how many reach the bar."""
    count, of = len(removal.reaching()), len(removal.concepts)
    return "\n".join(
        [
            f"{'concept':<12}{'features':>8}{'strength':>10}{'UA':>7}{'IRA':>7}{'CRA':>7}{'own':>7}",
            *map(_told, removal.concepts),
            f"{count} of {of} concepts reach 90/90",
        ]
    )
