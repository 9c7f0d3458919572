"""`difflex steer-eval`: do edits do what they say, on the drawn world, beside what they must beat."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, NamedTuple, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.commands.contrast import contrasted
from difflex.commands.flags import Range
from difflex.commands.opening import load_studied
from difflex.commands.steer import Strengths
from difflex.concepts import Matches
from difflex.errors import BadInput
from difflex.miniature import load_judge
from difflex.pipeline import Pipeline
from difflex.records import Edit, Unit
from difflex.steering import (
    Curve,
    Drawn,
    Features,
    Judged,
    Steering,
    Toolbox,
    Trial,
    at_random,
    judge,
    steered_along,
    steerings,
)
from difflex.study import Command, Place, Study
from difflex.trials import DrawnJudge, as_pictures, as_tensor, drawn_pairs, drawn_task, group_of, reworded

__all__ = ["SteerEval"]

LEVELS = (0.3, 0.6, 0.9)
"""Of noise, at which finished pictures are foretold."""
RANDOM_SEED = 0


class Wanted(NamedTuple):
    """A concept and the feature that detects it."""

    concept: str
    feature: int
    ap: float


@final
@dataclass(frozen=True, kw_only=True)
class SteerEval(Command):
    """Steer towards known concepts with the features that detect them, and judge: does it appear, what else changes, what breaks.

    Beside each feature: the contrast of pairs of captions, a random direction of equal length, the neuron that detects the
    concept best, and the prompt edited instead.
    """

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study of a model of the drawn world, in which `difflex concepts` was run."""
    dictionary: Annotated[Positional[tuple[str, ...]], arg(metavar="DICTIONARY...", help_behavior_hint="(default: all)")] = ()
    """Which: SITE/LABEL, or the site alone where it has one dictionary."""
    groups: Annotated[tuple[str, ...], arg(metavar="GROUP...")] = ("colour", "texture", "background", "shape", "style")
    """Concepts of which groups."""
    least: Annotated[float, arg(metavar="AP")] = 0.8
    """Features of this average precision or more."""
    trials: Annotated[int, arg(metavar="N")] = 24
    """Pictures for each concept."""
    pairs: Annotated[int, arg(metavar="N")] = 20
    """Pairs of captions for each contrast."""
    strength: Strengths = (0.5, 1.0, 1.5, 2.0, 3.0)
    """How strongly: in the unit below for features, in lengths of the contrast for contrasts."""
    unit: Unit = "peak"
    """What 1 is: the feature's largest code, its mean code, the mean length of an activation, or a code of 1."""
    steps: Annotated[Range | None, arg(help_behavior_hint="(default: all)")] = None
    """At which denoising steps; END is left out."""
    offload: FlagCreatePairsOff[bool] = False
    """Keep on the card only the part at work."""

    def __call__(self) -> list[Path]:
        if self.trials < 1 or self.pairs < 1:
            raise BadInput(f"--trials {self.trials} --pairs {self.pairs} leave nothing to judge. Ask for 1 or more.")
        toolbox = Toolbox(Study.open(self.study))
        known = [place for place in toolbox.study.dictionaries() if place.site.kind != "neurons"]
        places = [toolbox.study.named(name) for name in self.dictionary] or known
        wanted = {place: self._wanted(toolbox.study, place) for place in places}
        pipe = load_studied(toolbox.study, None, self.offload, offline=False)
        written = []
        for place, concepts in wanted.items():
            curves = list(self._curves(toolbox, pipe, place, concepts))
            judged = Judged(
                model=toolbox.study.model, site=str(place.site), curves=tuple(curves), made_from=self._made_from(toolbox, place)
            )
            written.append(judged.save(toolbox.study.steering(*place)))
            print(f"{place}: {len(concepts)} concepts with a feature of AP {self.least:g} or more")
            print(_table(judged))
        return written

    def _wanted(self, study: Study, place: Place) -> list[Wanted]:
        path = study.concepts(*place)
        if not path.is_file():
            raise BadInput(
                f"Which concepts the features of {place} detect is not known: there is no {path}. Run difflex concepts."
            )
        findings = Matches.load(path).levels[0].findings
        return [
            Wanted(finding.concept.name, finding.best.features[0], finding.best.ap.value)
            for finding in findings
            if finding.concept.group in self.groups and finding.best.ap.value >= self.least and group_of(finding.concept.name)
        ]

    def _curves(self, toolbox: Toolbox, pipe: Pipeline, place: Place, concepts: Sequence[Wanted]) -> Iterator[Curve]:
        drawn = _drawn(pipe)
        for number, each in enumerate(concepts, 1):
            print(
                f"{place}: {each.concept} by feature {each.feature} (AP {each.ap:.2f}), {number} of {len(concepts)}", flush=True
            )
            yield from judge(drawn_task(each.concept, self.trials), self._methods(toolbox, pipe, place, each), drawn)

    def _methods(self, toolbox: Toolbox, pipe: Pipeline, place: Place, wanted: Wanted):
        """Each method by name: what it adds, how, and at which strengths."""
        edit = Edit(
            what="add",
            site=place.site,
            dictionary=place.label,
            features=(wanted.feature,),
            unit=self.unit,
            steps=None if self.steps is None else (self.steps.start, self.steps.stop),
        )
        features = toolbox.features(edit)
        pairs = drawn_pairs(wanted.concept, self.pairs)
        along = steered_along(contrasted(pipe, place.site, pairs, steps=self.steps))
        methods = {
            "feature": (f"{place} {wanted.feature}", _adding(edit, features), self.strength),
            "contrast": (f"{len(pairs)} pairs", _adding(replace(edit, unit="code"), along), self.strength),
            "random": (f"seed {RANDOM_SEED}", _adding(edit, at_random(features, RANDOM_SEED)), self.strength),
            "prompt": ("the caption says so", _saying(wanted.concept), (1.0,)),
        }
        return {**methods, **self._neuron(toolbox, place, wanted, edit)}

    def _neuron(self, toolbox: Toolbox, place: Place, wanted: Wanted, edit: Edit):
        """The neuron of the same block that detects the concept best, where the study holds its block's neurons."""
        site = replace(place.site, kind="neurons")
        there = [each for each in toolbox.study.dictionaries() if each.site == site and toolbox.study.concepts(*each).is_file()]
        if not there:
            return {}
        findings = Matches.load(toolbox.study.concepts(*there[0])).levels[0].findings
        found = [finding.best.features[0] for finding in findings if finding.concept.name == wanted.concept]
        if not found:
            return {}
        own = replace(edit, site=site, dictionary=there[0].label, features=(found[0],))
        return {"neuron": (f"{there[0]} {found[0]}", _adding(own, toolbox.features(own)), self.strength)}

    def _made_from(self, toolbox: Toolbox, place: Place) -> Mapping[str, str | int | float]:
        edit = Edit(what="add", site=place.site, dictionary=place.label)
        return {
            **toolbox.checksums([edit]),
            "trials": self.trials,
            "pairs": self.pairs,
            "least": self.least,
            "unit": self.unit,
            "steps": "all" if self.steps is None else f"{self.steps.start}:{self.steps.stop}",
            "strengths": ",".join(f"{strength:g}" for strength in self.strength),
        }


def _adding(edit: Edit, features: Features):
    def added(trial: Trial, strength: float) -> tuple[Trial, Steering | None]:
        here = replace(edit, strength=strength, region=trial.region)
        return trial, steerings([here], lambda _: features)[0]

    return added


def _saying(concept: str):
    """The caption edited in place of the activations."""
    return lambda trial, strength: (reworded(trial, concept), None)


def _drawn(pipe: Pipeline) -> Drawn:
    """What the model draws and says, and what the judge sees."""

    def pictures(trials: Sequence[Trial], steering: Steering | None):
        prompts = [trial.prompt for trial in trials]
        made = pipe.generate(prompts, seed=trials[0].seed, batch=32, edits=[steering] if steering else [])
        return as_tensor(each.picture for each in made)

    return Drawn(pictures, DrawnJudge(load_judge()), lambda drawn: pipe.losses(as_pictures(drawn), LEVELS).mean(1))


def _table(judged: Judged) -> str:
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
