"""`difflex steer-eval`: do edits do what they say, beside what they must beat."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Annotated, NamedTuple, final

from PIL import Image
from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.choices import Unit
from difflex.commands.contrast import contrasted
from difflex.commands.flags import Range, Strengths, VLMCommand
from difflex.commands.inputs import load_study_model
from difflex.effects import (
    ConceptSpec,
    ImageStrip,
    JudgedGenerator,
    SteeringResults,
    SteeringTask,
    SteeringTrial,
    StrengthCurve,
    judge,
)
from difflex.effects.detected import matches_of, neurons_beside
from difflex.effects.drawing import drawn_by
from difflex.effects.trials import as_images, group_of
from difflex.effects.worlds import DRAWN, JudgedWorld, read_told, told_world
from difflex.errors import BadInput
from difflex.files import file_sha256
from difflex.pipeline import Pipeline
from difflex.records import Edit
from difflex.steering import EditFeatures, SteeringHook, StudyEditor, random_features, steering_hooks
from difflex.steering.contrast import contrast_features
from difflex.study import DictionaryRef, Study

__all__ = ["SteerEvalCommand"]


class TargetConcept(NamedTuple):
    """A concept and the feature that detects it."""

    concept: str
    feature: int
    ap: float | None
    """None where somebody else says that it detects it."""


@final
@dataclass(frozen=True, kw_only=True)
class SteerEvalCommand(VLMCommand):
    """Steer towards known concepts with the features that detect them, and judge: does it appear, what else changes, what breaks.

    Beside each feature: the contrast of pairs of captions, a random direction of equal length, the neuron that detects the
    concept best, and the prompt edited instead.
    """

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study in which `difflex concepts` was run, or where --concepts says which features are meant."""
    dictionary: Annotated[Positional[tuple[str, ...]], arg(metavar="DICTIONARY...", help_behavior_hint="(default: all)")] = ()
    """Which: SITE/LABEL, or the site alone where it has one dictionary."""
    groups: Annotated[tuple[str, ...], arg(metavar="GROUP...")] = ("colour", "texture", "background", "shape", "style")
    """Concepts of which groups."""
    min_ap: Annotated[float, arg(metavar="AP")] = 0.8
    """Features of this average precision or more."""
    trials: Annotated[int, arg(metavar="N")] = 24
    """Images for each concept."""
    pairs: Annotated[int, arg(metavar="N")] = 20
    """Pairs of captions for each contrast."""
    strength: Strengths = (0.5, 1.0, 1.5, 2.0, 3.0)
    """How strongly: in the unit below for features, in lengths of the contrast for contrasts."""
    unit: Unit = "peak"
    """What 1 is: the feature's largest code, its mean code, the mean length of an activation, or a code of 1."""
    edit_steps: Annotated[Range | None, arg(help_behavior_hint="(default: all)")] = None
    """At which denoising steps; END is left out."""
    concepts: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: the drawn world)")] = None
    """Concepts in words, for a model whose world nobody drew: a TOML file. --clip or --vlm sees them."""
    clip: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: none)")] = None
    """With --concepts, the judge: a CLIP of transformers by its folder or hub name."""
    vlm: Annotated[str | None, arg(metavar="WHO", help_behavior_hint="(default: none)")] = None
    """With --concepts, the judge: a model that answers, as for difflex explain."""
    offload: FlagCreatePairsOff[bool] = False
    """Keep on the card only the part at work."""

    def __call__(self) -> list[Path]:
        if self.trials < 1 or self.pairs < 1:
            raise BadInput(f"--trials {self.trials} --pairs {self.pairs} leave nothing to judge. Ask for 1 or more.")
        toolbox = StudyEditor(Study.open(self.study))
        known = [place for place in toolbox.study.dictionaries() if place.site.kind != "neurons"]
        places = [toolbox.study.find_dictionary(name) for name in self.dictionary] or known
        told = read_told(self.concepts) if self.concepts else {}
        if told and len(places) > 1 and any(each.feature is not None for each in told.values()):
            raise BadInput(f"{self.concepts} names features, which are of one dictionary; asked are {len(places)}. Name one.")
        if not told and (self.clip or self.vlm):
            raise BadInput("The drawn world has its own judge. --clip and --vlm see the concepts that --concepts FILE tells.")
        wanted = {place: self._wanted(toolbox.study, place, told) for place in places}
        with told_world(told, toolbox.study, self, self.clip, self.vlm) if told else nullcontext(DRAWN) as world:
            return self._all(toolbox, wanted, world)

    def _all(
        self, toolbox: StudyEditor, wanted: Mapping[DictionaryRef, Sequence[TargetConcept]], world: JudgedWorld
    ) -> list[Path]:
        """The files with what was judged, one for each dictionary; what was judged before just so is left as it is."""
        pipe = cache(lambda: load_study_model(toolbox.study, None, self.offload, self.offline))
        written = []
        for place, concepts in wanted.items():
            path, made_from = toolbox.study.steering(*place), self._made_from(toolbox, place, concepts)
            known = SteeringResults.load(path) if path.is_file() else None
            shown = known is not None and all((path.with_suffix("") / strip.file).is_file() for strip in known.strips)
            if known is None or not shown or known.made_from != made_from:
                curves, strips = self._judged(toolbox, pipe(), place, concepts, world)
                judged = SteeringResults(
                    model=toolbox.study.model,
                    site=str(place.site),
                    curves=tuple(curves),
                    made_from=made_from,
                    strips=tuple(strips),
                )
                judged.save(path)
                _keep(path.with_suffix(""), strips)
            else:
                judged = known
            written.append(path)
            judged_as = "" if self.concepts else f" with a feature of AP {self.min_ap:g} or more"
            print(f"{place}: {len(concepts)} concepts{judged_as}{', as before' if judged is known else ''}")
            print(_table(judged))
        return written

    def _wanted(self, study: Study, place: DictionaryRef, told: Mapping[str, ConceptSpec]) -> list[TargetConcept]:
        given = [TargetConcept(each.concept, each.feature, None) for each in told.values() if each.feature is not None]
        if told and len(given) == len(told):
            return given
        matches = matches_of(study, place)
        if matches is None:
            raise BadInput(
                f"Which concepts the features of {place} detect is not known: there is no {study.concepts(*place)}. "
                "Run difflex concepts."
            )
        asked = {name for name, each in told.items() if each.feature is None}
        return given + [
            TargetConcept(concept.name, finding.best.features[0], finding.best.ap.value)
            for finding in matches.clearest_level.results
            if (concept := finding.concept).name in asked
            or (not told and concept.group in self.groups and group_of(concept.name))
            if finding.best.ap.value >= self.min_ap
        ]

    def _judged(
        self, toolbox: StudyEditor, pipe: Pipeline, place: DictionaryRef, concepts: Sequence[TargetConcept], world: JudgedWorld
    ) -> tuple[list[StrengthCurve], dict[ImageStrip, Image.Image]]:
        """All curves, and of each group the images of the concept that its feature is best at."""
        seen = _StripRecorder(world.seen(drawn_by(pipe)))
        curves, best = list[StrengthCurve](), dict[str, tuple[float, dict[ImageStrip, Image.Image]]]()
        for number, each in enumerate(concepts, 1):
            known = "" if each.ap is None else f" (AP {each.ap:.2f})"
            print(f"{place}: {each.concept} by feature {each.feature}{known}, {number} of {len(concepts)}", flush=True)
            task = world.task(each.concept, self.trials)
            made = list(judge(task, self._methods(toolbox, pipe, place, each, world), seen.drawn))
            gain, strips = made[0].gain(), dict(seen.strips(task, made))
            if task.group not in best or gain > best[task.group][0]:
                best[task.group] = gain, strips
            curves += made
        return curves, {strip: image for _, strips in best.values() for strip, image in strips.items()}

    def _methods(self, toolbox: StudyEditor, pipe: Pipeline, place: DictionaryRef, wanted: TargetConcept, world: JudgedWorld):
        """Each method by name: what it adds, how, and at which strengths."""
        edit = Edit(
            operation="add",
            site=place.site,
            dictionary=place.label,
            features=(wanted.feature,),
            unit=self.unit,
            steps=None if self.edit_steps is None else (self.edit_steps.start, self.edit_steps.stop),
        )
        features = toolbox.features(edit)
        pairs = world.pairs(wanted.concept, self.pairs)
        inside = lambda shot: world.inside(shot, wanted.concept)  # noqa: E731
        along = contrast_features(contrasted(pipe, place.site, pairs, steps=self.edit_steps, region=inside))
        methods = {
            "feature": (f"{place} {wanted.feature}", _adding(edit, features), self.strength),
            "contrast": (f"{len(pairs)} pairs", _adding(replace(edit, unit="code"), along), self.strength),
            "random": (f"seed {wanted.feature}", _adding(edit, random_features(features, wanted.feature)), self.strength),
            "prompt": ("the caption says so", _saying(wanted.concept, world), (1.0,)),
        }
        return {**methods, **self._neuron(toolbox, place, wanted, edit)}

    def _neuron(self, toolbox: StudyEditor, place: DictionaryRef, wanted: TargetConcept, edit: Edit):
        """The neuron of the same block that detects the concept best, where that is known."""
        known = neurons_beside(toolbox, place)
        neuron = None if known is None else known.best.get(wanted.concept)
        if known is None or neuron is None:
            return {}
        own = replace(edit, site=known.place.site, dictionary=known.place.label, features=(neuron,))
        return {"neuron": (f"{known.place} {neuron}", _adding(own, toolbox.features(own)), self.strength)}

    def _made_from(
        self, toolbox: StudyEditor, place: DictionaryRef, concepts: Sequence[TargetConcept]
    ) -> Mapping[str, str | int | float]:
        neurons = neurons_beside(toolbox, place)
        used = [place] if neurons is None else [place, neurons.place]
        edits = [Edit(operation="add", site=each.site, dictionary=each.label) for each in used]
        return {
            **toolbox.checksums(edits),
            "concepts": ",".join(f"{each.concept} {each.feature}" for each in concepts),
            "neurons": ""
            if neurons is None
            else ",".join(f"{each.concept} {neurons.best.get(each.concept)}" for each in concepts),
            "groups": ",".join(self.groups),
            "told": file_sha256(self.concepts) if self.concepts else "",
            "judge": self.clip or self.model or self.vlm or "of the drawn world",
            "trials": self.trials,
            "pairs": self.pairs,
            "least": self.min_ap,
            "unit": self.unit,
            "steps": "all" if self.edit_steps is None else f"{self.edit_steps.start}:{self.edit_steps.stop}",
            "strengths": ",".join(f"{strength:g}" for strength in self.strength),
        }


def _adding(edit: Edit, features: EditFeatures):
    def added(trial: SteeringTrial, strength: float) -> tuple[SteeringTrial, SteeringHook | None]:
        # Tokens of text have no place in the image.
        here = replace(edit, strength=strength, region=None if edit.site.stream == "text" else trial.region)
        return trial, steering_hooks([here], lambda _: features)[0]

    return added


def _saying(concept: str, world: JudgedWorld):
    """The caption edited in place of the activations."""
    return lambda trial, strength: (world.reworded(trial, concept), None)


@final
class _StripRecorder:
    """What is drawn, with the first image of every batch kept to be shown."""

    def __init__(self, drawn: JudgedGenerator) -> None:
        self._first: list[Image.Image] = []
        self._images = drawn.images
        self.drawn = drawn._replace(images=self._drawn)

    def _drawn(self, trials: Sequence[SteeringTrial], steering: SteeringHook | None):
        made = self._images(trials, steering)
        self._first += as_images(made[:1])
        return made

    def strips(self, task: SteeringTask, curves: Sequence[StrengthCurve]) -> Iterator[tuple[ImageStrip, Image.Image]]:
        """The images kept since the last call, a strip for each of `curves`, which were judged one after another."""
        plain, *edited = self._first
        self._first.clear()
        for curve in curves:
            tiles = [plain, *(edited.pop(0) for _ in curve.points)]
            strip = ImageStrip(
                method=curve.method,
                concept=curve.concept,
                group=curve.group,
                prompt=task.trials[0].prompt,
                strengths=tuple(point.strength for point in curve.points),
                file=f"{curve.group}-{curve.method}.webp",
            )
            yield strip, _beside(tiles)


def _beside(tiles: Sequence[Image.Image]) -> Image.Image:
    """Images of one size side by side."""
    width, height = tiles[0].size
    made = Image.new("RGB", (width * len(tiles), height))
    for place, tile in enumerate(tiles):
        made.paste(tile, (place * width, 0))
    return made


def _keep(folder: Path, strips: Mapping[ImageStrip, Image.Image]) -> None:
    """Nothing; the folder holds these strips and no other."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.webp"):
        stale.unlink()
    for strip, image in strips.items():
        image.save(folder / strip.file, lossless=True)


def _table(judged: SteeringResults) -> str:
    """A line for each method: medians over concepts, at the strength that is best for each."""
    lines = [f"{'method':<10}{'concepts':>9}{'gain':>8}{'success':>9}{'without':>9}{'kept':>7}{'loss':>7}{'strength':>10}"]
    for method in dict.fromkeys(curve.method for curve in judged.curves):
        curves = judged.of(method)
        best = [point for curve in curves if (point := curve.best()) is not None]
        middle = lambda values: f"{median(values):.2f}" if values else "-"  # noqa: E731
        lines.append(
            f"{method:<10}{len(curves):>9}{middle([curve.gain() for curve in curves]):>8}"
            f"{middle([point.success for point in best]):>9}{middle([curve.without for curve in curves]):>9}"
            f"{middle([point.specificity for point in best]):>7}{middle([point.quality for point in best]):>7}"
            f"{middle([point.strength for point in best]):>10}"
        )
    return "\n".join(lines)
