"""`difflex findings`: what papers found of steering, tried on a model of the drawn world."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.commands.contrast import both_sides
from difflex.commands.flags import Numbers, Strengths
from difflex.commands.inputs import load_study_model
from difflex.effects import findings
from difflex.effects.detected import matches_of
from difflex.effects.drawing import drawn_by
from difflex.effects.findings import (
    EXPERIMENTS,
    ExperimentBench,
    Finding,
    FindingsConfig,
    SteeringDirection,
    finding,
    pairs_for,
)
from difflex.effects.trials import group_of, placed
from difflex.errors import BadInput, StaleWork
from difflex.evaluation.concepts.results import ConceptMatches
from difflex.files import file_sha256
from difflex.pipeline import Pipeline
from difflex.records import Edit, Site
from difflex.steering import StudyEditor
from difflex.steering.contrast import contrast_features, find_contrasts
from difflex.study import Command, DictionaryRef, Study

__all__ = ["FindingsCommand"]

LEAST = 0.5
"""A feature of this average precision or more stands for a concept; else its contrast does."""
Name = Literal["pairs", "distribution", "adversarial", "quality", "size", "related", "steps"]
BY_FEATURES = ("related", "steps")
"""Experiments in which features are tried where there are any."""


class DetectingFeature(NamedTuple):
    """A feature that stands for a concept."""

    place: DictionaryRef
    number: int


@final
@dataclass(frozen=True, kw_only=True)
class FindingsCommand(Command):
    """Try on a model of the drawn world what papers found of steering, and say of each finding whether it holds here.

    Five of arXiv 2505.03189 on contrasts, two of arXiv 2505.24360 on features. Given again, it makes what is lacking.
    """

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study of a model of the drawn world; it need not hold anything yet."""
    site: Annotated[str | None, arg(metavar="SITE", help_behavior_hint="(default: that of the study's dictionaries)")] = None
    """Where to steer."""
    finding: Annotated[tuple[Name, ...], arg(metavar="NAME...", help_behavior_hint="(default: all)")] = ()
    """Which experiments."""
    groups: Annotated[tuple[str, ...], arg(metavar="GROUP...")] = ("colour", "texture", "background", "style")
    """Concepts of which groups."""
    concepts_per_group: Annotated[int, arg(metavar="N")] = 2
    """How many of each group."""
    trials: Annotated[int, arg(metavar="N")] = 8
    """Images for each concept and condition."""
    pairs: Numbers = (1, 2, 5, 10, 20, 40, 80, 160)
    """Contrasts from so many pairs; where that does not matter, from the most."""
    strength: Strengths = (0.1, 0.2, 0.35, 0.6, 1.0)
    """How strongly, in lengths of a mean activation; the first and last are tried where quality is measured alone."""
    other_model: Annotated[Path | None, arg(metavar="STUDY", help_behavior_hint="(default: none)")] = None
    """The study of a larger or smaller model, with findings of its own, for the finding on size."""
    offload: FlagCreatePairsOff[bool] = False
    """Keep on the card only the part at work."""

    def __call__(self) -> list[Path]:
        scope = self._scope()
        toolbox = StudyEditor(Study.open(self.study))
        pipe = load_study_model(toolbox.study, None, self.offload, offline=False)
        site = self._site(toolbox.study, pipe)
        path, other = toolbox.study.findings(site), self._other(site)
        detectors = _detectors(toolbox.study, site, scope.concepts())
        bench = self._bench(toolbox, pipe, site, scope, detectors, other)
        known = findings.Findings.load(path) if path.is_file() else None
        made = findings.Findings(
            model=toolbox.study.model,
            revision=toolbox.study.revision,
            site=str(site),
            parameters=bench.parameters,
            found=() if known is None else known.found,
        )
        names = self.finding or tuple(EXPERIMENTS)
        for number, name in enumerate(names, 1):
            made_from = self._made_from(toolbox, site, scope, name, detectors, other)
            is_there = _is_as(made.of(name), name, made_from)
            print(f"{site}: {name}, {number} of {len(names)}{', as before' if is_there else ''}", flush=True)
            if not is_there:
                made = _with(made, finding(name, bench, made_from))
                made.save(path)
        print("\n".join(f"{each.verdict:<19}{each.claim}\n{'':<19}{each.because}" for each in made.found))
        return [path]

    def _scope(self) -> FindingsConfig:
        if self.trials < 1 or not self.pairs or min(self.pairs) < 1 or not self.strength or min(self.strength) <= 0:
            raise BadInput(
                f"--trials {self.trials}, --pairs {','.join(map(str, self.pairs))} and --strength "
                f"{','.join(f'{each:g}' for each in self.strength)} leave nothing to try. Give numbers above 0."
            )
        scope = FindingsConfig(
            groups=self.groups,
            each=self.concepts_per_group,
            trials=self.trials,
            counts=tuple(sorted(set(self.pairs))),
            strengths=tuple(sorted(set(self.strength))),
        )
        scope.concepts()  # says what is wrong with them
        return scope

    def _site(self, study: Study, pipe: Pipeline) -> Site:
        """The site asked for, or that of the study's dictionaries."""
        if self.site is not None:
            return pipe.site(self.site)
        there = list(dict.fromkeys(place.site for place in study.dictionaries() if place.site.kind != "neurons"))
        if len(there) != 1:
            raise BadInput(f"{self.study} has dictionaries of {len(there)} sites. Say with --site where to steer.")
        return there[0]

    def _other(self, site: Site) -> Path | None:
        """The file of the other study."""
        if self.other_model is None:
            return None
        study = Study.open(self.other_model)
        there = sorted((study.folder / "steering" / "findings").glob("*.json"))
        own = study.findings(site)
        if not there or (own not in there and len(there) > 1):
            what = "findings of several sites, none of them" if there else "no findings, nor any"
            raise BadInput(f"{self.other_model} has {what} at {site}. Run difflex findings {self.other_model} first.")
        return own if own in there else there[0]

    def _bench(
        self,
        toolbox: StudyEditor,
        pipe: Pipeline,
        site: Site,
        scope: FindingsConfig,
        detectors: Mapping[str, DetectingFeature],
        other: Path | None,
    ) -> ExperimentBench:
        def contrasted(concept: str) -> Mapping[int, SteeringDirection]:
            sides = both_sides(pipe, site, pairs_for(concept, max(scope.counts)), batch=32)
            found = find_contrasts(*sides, scope.counts, region=lambda shot: placed(shot.prompt, group_of(concept)))
            return {each.pairs: SteeringDirection(f"{each.pairs} pairs", contrast_features(each)) for each in found}

        return ExperimentBench(
            site=site,
            scope=scope,
            parameters=sum(weights.numel() for weights in pipe.denoiser.parameters()),
            drawn=lambda steps: drawn_by(pipe, steps),
            contrasts=contrasted,
            feature=lambda concept: _way(toolbox, detectors[concept]) if concept in detectors else None,
            other=None if other is None else findings.Findings.load(other),
        )

    def _made_from(
        self,
        toolbox: StudyEditor,
        site: Site,
        scope: FindingsConfig,
        name: str,
        detectors: Mapping[str, DetectingFeature],
        other: Path | None,
    ) -> Mapping[str, str | int | float]:
        """What the figures of an experiment depend on."""
        by = detectors if name in BY_FEATURES else {}
        features = ",".join(f"{concept} {place} {number}" for concept, (place, number) in by.items())
        return {
            **toolbox.checksums([Edit(operation="add", site=site, dictionary=place.label) for place, _ in by.values()]),
            **({"features": features} if features else {}),
            **({"other": file_sha256(other)} if other is not None and name == "size" else {}),
            "groups": ",".join(scope.groups),
            "concepts": scope.each,
            "trials": scope.trials,
            "pairs": ",".join(map(str, scope.counts)),
            "strengths": ",".join(f"{strength:g}" for strength in scope.strengths),
        }


def _with(known: findings.Findings, made: Finding) -> findings.Findings:
    """The findings with a new one in the place of the old."""
    found = {each.name: each for each in (*known.found, made)}
    return replace(known, found=tuple(found[name] for name in EXPERIMENTS if name in found))


def _is_as(known: Finding | None, name: str, made_from: Mapping[str, str | int | float]) -> bool:
    """Whether a finding is there that would come out again: made from the same, by the same rule."""
    return known is not None and known.made_from == made_from and known.rule == EXPERIMENTS[name].rule


def _detectors(study: Study, site: Site, concepts: Sequence[str]) -> dict[str, DetectingFeature]:
    """For each of `concepts` that a feature of the study's dictionaries at a site detects the best one."""
    found: dict[str, tuple[float, DetectingFeature]] = {}
    for place, matches in _known(study, site):
        for each in matches.clearest_level.results:
            ap, name = each.best.ap.value, each.concept.name
            if name in concepts and ap >= (found[name][0] if name in found else LEAST):
                found[name] = ap, DetectingFeature(place, each.best.features[0])
    return {concept: found[concept][1] for concept in concepts if concept in found}


def _known(study: Study, site: Site) -> Iterator[tuple[DictionaryRef, ConceptMatches]]:
    """What the features of dictionaries at a site detect; those that have changed since are named and left out."""
    for place in study.dictionaries():
        try:
            matches = matches_of(study, place) if place.site == site else None
        except StaleWork as error:
            print(error)
            continue
        if matches is not None:
            yield place, matches


def _way(toolbox: StudyEditor, feature: DetectingFeature) -> SteeringDirection:
    place, number = feature
    edit = Edit(operation="add", site=place.site, dictionary=place.label, features=(number,), unit="norm")
    return SteeringDirection(f"{place} {number}", toolbox.features(edit))
