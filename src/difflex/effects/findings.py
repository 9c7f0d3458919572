"""Published findings about steering as experiments: five of arXiv 2505.03189 and two of arXiv 2505.24360, each with a rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from difflex.effects import finding_rules as rules
from difflex.effects.drawn_world import CaptionKind
from difflex.effects.experiment_bench import ExperimentBench, detecting_features, make_bench
from difflex.effects.finding_rules import Finding, FindingLine, Findings, FindingsConfig, RuleCondition, Ruling
from difflex.effects.inputs import ModelFunctions, Provenance
from difflex.effects.judging import StrengthCurve, StrengthPoint
from difflex.errors import BadInput
from difflex.files import file_sha256, folder_lock
from difflex.miniature.world import OBJECT_GROUPS
from difflex.records import Site
from difflex.study import DictionaryRef, Study

__all__ = ["EXPERIMENTS", "Finding", "FindingLine", "Findings", "FindingsConfig", "run_experiment", "run_findings"]

KNEE, BEFORE, FLAT = 80, 20, 0.05
"""Pairs at the knee and before it; a gain below the last is none."""
RUN, FIRST = 7, 5
"""Steps of a run, and how many of them are edited, in arXiv 2505.24360."""
BY_FEATURES = ("related", "steps")
"""Experiments that use features, if there are any."""
STRENGTH, ADDED = "strength, in norms of a mean activation", "success minus that without the edit"
LOSS = "loss over that of unedited images"


class ExperimentOutcome(NamedTuple):
    """The result of an experiment."""

    ruling: Ruling
    numbers: dict[str, float]
    x: str
    y: str
    lines: tuple[FindingLine, ...]
    curves: tuple[StrengthCurve, ...]


def _pairs(bench: ExperimentBench) -> ExperimentOutcome:
    """Contrasts on more and more pairs."""
    counts, curves = bench.config.pairs, list[StrengthCurve]()
    for concept in bench.config.concepts():
        fewer = {f"{count} pairs": features for count, features in bench.contrasts(concept).items() if count != max(counts)}
        curves += bench.curves(concept, "alike", fewer)
        curves.append(replace(bench.alike(concept), method=f"{max(counts)} pairs"))
    by_count = lambda several: [  # noqa: E731
        [curve.gain(rules.KEPT) for curve in several if curve.method == f"{count} pairs"] for count in counts
    ]
    gains = dict(zip(counts, by_count(curves), strict=True))
    lines = [
        rules.line_of_columns(name, counts, by_count(several))
        for name, several in {"all concepts": curves, **_by_group(curves)}.items()
    ]
    numbers = {f"gain of {count} pairs": fmean(values) for count, values in gains.items()}
    return ExperimentOutcome(rule_knee(gains), numbers, "pairs", "gain", tuple(lines), tuple(curves))


def _by_group(curves: Sequence[StrengthCurve]) -> dict[str, list[StrengthCurve]]:
    """Return curves by the group of their concept."""
    groups = dict.fromkeys(curve.group for curve in curves)
    return {group: [curve for curve in curves if curve.group == group] for group in groups}


def rule_knee(gains: Mapping[int, Sequence[float]]) -> Ruling:
    """Rule whether the gain rises before the knee and no longer after it."""
    most = max(gains)
    if KNEE not in gains or BEFORE not in gains or most <= KNEE:
        reason = f"A knee at {KNEE} takes contrasts of {BEFORE}, {KNEE} and more pairs: name them."
        return Ruling("cannot be said", reason)
    rises = RuleCondition([b - a for a, b in zip(gains[BEFORE], gains[KNEE], strict=True)], FLAT)
    flat = RuleCondition([a - b for a, b in zip(gains[KNEE], gains[most], strict=True)], -FLAT)
    means = {count: fmean(values) for count, values in gains.items()}
    enough = min(count for count, value in means.items() if value >= means[most] - FLAT)
    numbers = ", ".join(f"{value:.2f} by {count}" for count, value in means.items())
    return rules.rule([rises, flat], f"gain {numbers} pairs; {enough} come within {FLAT} of {most}")


def _distribution(bench: ExperimentBench) -> ExperimentOutcome:
    """Captions of other kinds than those of the pairs."""
    kinds: tuple[CaptionKind, ...] = ("alike", "other scenery", "two objects")
    by_concept = [bench.compare_kinds(concept, kinds, bench.contrast(concept)) for concept in bench.config.concepts()]
    others = {"other scenery": "with other scenery", "two objects": "with two objects"}
    return _compared(kinds, by_concept, "gain on captions like the pairs", others)


def _adversarial(bench: ExperimentBench) -> ExperimentOutcome:
    """Captions that name another concept several times, and captions that name none."""
    concepts = bench.config.concepts([group for group in bench.config.groups if group != "shape"])
    by_concept = [bench.compare_kinds(concept, ("unsaid", "against"), bench.contrast(concept)) for concept in concepts]
    others = {"against": "where they argue against it"}
    return _compared(("unsaid", "against"), by_concept, "gain where captions leave it open", others)


def _quality(bench: ExperimentBench) -> ExperimentOutcome:
    """The loss by strength."""
    curves = [bench.base(concept) for concept in bench.config.concepts()]
    by_name = {"all concepts": curves, **_by_group(curves)}
    lines = [rules.line_of_curves(name, several, _loss) for name, several in by_name.items()]
    numbers = {f"loss at {x:g}": y for x, y in zip(lines[0].x, lines[0].y, strict=True)}
    return ExperimentOutcome(rules.rule_rising(curves), numbers, STRENGTH, LOSS, tuple(lines), tuple(curves))


def _size(bench: ExperimentBench) -> ExperimentOutcome:
    """The loss in a larger and in a smaller model."""
    curves = [bench.base(concept) for concept in bench.config.concepts()]
    lines = [rules.line_of_curves(_millions(bench.parameters), curves, _loss)]
    quality = bench.other.of("quality") if bench.other is not None else None
    others = {curve.concept: curve for curve in quality.curves} if quality is not None else {}
    pairs = [(curve, others[curve.concept]) for curve in curves if curve.concept in others]
    shared = [pair for pair in pairs if _shared_strengths(*pair)]
    if bench.other is None or quality is None or not shared or bench.other.parameters == bench.parameters:
        problem = "There is one model" if bench.other is None else "The other model has the same size, or nothing in common"
        reason = f"{problem}. --other-model names a study of another size with findings of the same concepts."
        return ExperimentOutcome(Ruling("cannot be said", reason), {}, STRENGTH, LOSS, tuple(lines), tuple(curves))
    excess = [(_mean_loss(a, b), _mean_loss(b, a)) for a, b in shared]
    smaller_first = [pair if bench.parameters < bench.other.parameters else pair[::-1] for pair in excess]
    names = _millions(bench.parameters), _millions(bench.other.parameters)
    numbers = {f"loss, {name}": fmean([pair[i] for pair in excess]) for i, name in enumerate(names)}
    means = ", ".join(f"{value:.2f} of {name}" for name, value in zip(names, numbers.values(), strict=True))
    is_less = RuleCondition([small - large for small, large in smaller_first])
    lines.append(rules.line_of_curves(names[1], list(quality.curves), _loss))
    both = tuple(curve for pair in shared for curve in pair)
    return ExperimentOutcome(rules.rule([is_less], f"mean loss {means}"), numbers, STRENGTH, LOSS, tuple(lines), both)


def _related(bench: ExperimentBench) -> ExperimentOutcome:
    """Prompts with an object that could have the concept, and prompts with none."""
    kinds: tuple[CaptionKind, ...] = ("an object", "no object")
    concepts = bench.config.concepts(OBJECT_GROUPS)
    by_concept = [bench.compare_kinds(concept, kinds, bench.best_direction(concept)) for concept in concepts]
    # Specificity does not count here: without an object there is less to keep.
    return _compared(kinds, by_concept, "gain with an object in the prompt", {"no object": "with none"}, retention=0)


def _steps(bench: ExperimentBench) -> ExperimentOutcome:
    """All steps of a run edited, and the first of them."""
    names = ("all steps", f"first {FIRST} of {RUN}")
    by_concept = []
    for concept in bench.config.concepts():
        directions = dict.fromkeys(names, bench.best_direction(concept))
        by_concept.append(bench.curves(concept, "alike", directions, run=RUN, edit_steps={names[1]: (0, FIRST)}))
    curves = {name: [several[i] for several in by_concept] for i, name in enumerate(names)}
    excess = {name: [_mean_loss(curve) - 1 for curve in several] for name, several in curves.items()}
    text = "loss above that of unedited images with all steps"
    ruling = rules.rule_half(text, excess[names[0]], {f"with the {names[1]}": excess[names[1]]})
    numbers = {f"excess loss, {name}": fmean(values) for name, values in excess.items()}
    numbers |= {f"gain, {name}": fmean([curve.gain(rules.KEPT) for curve in several]) for name, several in curves.items()}
    return _over_strengths(ruling, numbers, curves, LOSS)


def _over_strengths(
    ruling: Ruling, numbers: dict[str, float], by_name: Mapping[str, Sequence[StrengthCurve]], y: str
) -> ExperimentOutcome:
    """Return the outcome with a line over strengths for the curves of each name: of success or, if `y` is LOSS, of the loss."""
    value = _loss if y == LOSS else _added
    lines = tuple(rules.line_of_curves(name, curves, value) for name, curves in by_name.items())
    flat = tuple(curve for curves in by_name.values() for curve in curves)
    return ExperimentOutcome(ruling, numbers, STRENGTH, y, lines, flat)


def _compared(
    kinds: Sequence[str],
    by_concept: Sequence[Sequence[StrengthCurve]],
    first: str,
    others: Mapping[str, str],
    retention: float = rules.KEPT,
) -> ExperimentOutcome:
    """Rule whether the gain on captions of other kinds is under half of that on the first; `first` and `others` describe them.

    Gains are shares of what could be gained, as unedited images that show the concept leave less; concepts that all of them show
    are left out.
    """
    open_concepts = [several for several in by_concept if all(curve.without < 1 for curve in several)]
    curves = {kind: [several[i] for several in open_concepts] for i, kind in enumerate(kinds)}
    gains = {kind: [curve.gain(retention) / (1 - curve.without) for curve in several] for kind, several in curves.items()}
    ruling = rules.rule_half(first, gains[kinds[0]], {text: gains[kind] for kind, text in others.items()})
    numbers = {f"gain, {kind}": fmean(values) for kind, values in gains.items() if values}
    return _over_strengths(ruling, numbers, curves, ADDED)


def _added(curve: StrengthCurve, point: StrengthPoint) -> float:
    return point.success - curve.without


def _loss(curve: StrengthCurve, point: StrengthPoint) -> float:
    return point.quality


def _shared_strengths(curve: StrengthCurve, other: StrengthCurve) -> set[float]:
    return {point.strength for point in curve.points} & {point.strength for point in other.points}


def _mean_loss(curve: StrengthCurve, other: StrengthCurve | None = None) -> float:
    """Return the mean loss over the strengths that `other` has, too."""
    shared = _shared_strengths(curve, other or curve)
    return fmean(point.quality for point in curve.points if point.strength in shared)


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.3g} million parameters"


class Experiment(NamedTuple):
    """A claim of a paper, the rule by which it holds, and the experiment."""

    claim: str
    paper: str
    condition: str
    run: Callable[[ExperimentBench], ExperimentOutcome]

    @property
    def rule(self) -> str:
        """When the claim holds, and how certain that is."""
        return f"{self.condition} {rules.CERTAINTY}"


SHARES = (
    "Gains are shares of what could be gained above unedited images. Images of all these captions count as broken from one "
    "loss on, 1.5 times the largest that unedited ones of a kind have."
)
CONTRASTS, FEATURES = "arXiv 2505.03189", "arXiv 2505.24360"
EXPERIMENTS = {
    "pairs": Experiment(
        f"The effect of a contrast rises with the number of its pairs, and flattens at about {KNEE}.",
        CONTRASTS,
        f"From {BEFORE} to {KNEE} pairs the gain rises by more than {FLAT}, and from {KNEE} to the most by less.",
        _pairs,
    ),
    "distribution": Experiment(
        "A contrast works on prompts like those it was found on, and fails on others.",
        CONTRASTS,
        "Both with other backgrounds and styles and with two objects the gain is under half of that on captions like the pairs. "
        + SHARES,
        _distribution,
    ),
    "adversarial": Experiment(
        "Prompts that argue against the edit undo it.",
        CONTRASTS,
        "Where captions name another concept of the group three times, the gain is under half of that where they name none. "
        + SHARES,
        _adversarial,
    ),
    "quality": Experiment(
        "Steering costs quality at every strength, and more the stronger it is.",
        CONTRASTS,
        "At every strength the unedited model's loss on edited images is above that on unedited ones, and rises to the next.",
        _quality,
    ),
    "size": Experiment(
        "A larger model loses less quality to steering.",
        CONTRASTS,
        "Over the strengths and concepts that both have, the mean loss of the larger model is below that of the smaller.",
        _size,
    ),
    "related": Experiment(
        "A feature has an effect only where the prompt is related to it.",
        FEATURES,
        "On captions that name a background and a style and no object the gain is under half of that on the same captions with "
        "an object; concepts of objects alone. Both are edited alike, where the one says that the object is; the concept "
        "counts wherever it is seen, and what else is kept does not count. " + SHARES,
        _related,
    ),
    "steps": Experiment(
        f"Steering all steps makes artefacts that steering the first {FIRST} of {RUN} does not.",
        FEATURES,
        f"What the loss is above that of unedited images, mean over strengths, is with the first {FIRST} of {RUN} steps under "
        "half of what it is with all.",
        _steps,
    ),
}
"""By name, in the order in which they are made."""


def run_experiment(name: str, bench: ExperimentBench, provenance: Provenance) -> Finding:
    """Make the experiment called `name` and return its finding."""
    experiment = EXPERIMENTS[name]
    outcome = experiment.run(bench)
    return Finding(
        name=name,
        claim=experiment.claim,
        paper=experiment.paper,
        rule=experiment.rule,
        **outcome.ruling._asdict(),
        **{field: value for field, value in outcome._asdict().items() if field != "ruling"},
        config=bench.config,
        provenance=provenance,
    )


def run_findings(
    study: Study,
    site: Site | None,
    config: FindingsConfig,
    model: ModelFunctions,
    names: Sequence[str] = (),
    other: Path | None = None,
    log: Callable[[str], None] = print,
) -> tuple[Path, Findings]:
    """Make experiments (all, without `names`) at a site, write the findings one by one and return them with their file.

    Without `site` it is the one of the study's dictionaries. `other` is a study of a model of another size with findings.
    Findings that are up to date are kept.
    """
    site = site or _only_site(study)
    path, other_path = study.findings(site), None if other is None else _other_findings(other, site)
    features = detecting_features(study, site, config.concepts(), log)
    bench = make_bench(study, site, config, model, features, other_path)
    with folder_lock(path.parent):
        return path, _update_findings(study, site, bench, names or tuple(EXPERIMENTS), features, other_path, model.weights(), log)


def _update_findings(
    study: Study,
    site: Site,
    bench: ExperimentBench,
    names: Sequence[str],
    features: Mapping[str, tuple[DictionaryRef, int]],
    other: Path | None,
    weights: str,
    log: Callable[[str], None],
) -> Findings:
    """Make the experiments that are not up to date; write the findings after each."""
    path = study.findings(site)
    stored = Findings.load(path).findings if path.is_file() else ()
    findings = Findings(model=study.model, revision=study.revision, site=str(site), parameters=bench.parameters, findings=stored)
    for number, name in enumerate(names, 1):
        provenance = replace(_provenance(study, name, features, other), weights=weights)
        is_current = _is_current(findings.of(name), name, bench.config, provenance)
        log(f"{site}: {name}, {number} of {len(names)}{', as before' if is_current else ''}")
        if not is_current:
            by_name = {finding.name: finding for finding in (*findings.findings, run_experiment(name, bench, provenance))}
            findings = replace(findings, findings=tuple(by_name[key] for key in EXPERIMENTS if key in by_name))
            findings.save(path)
    return findings


def _only_site(study: Study) -> Site:
    sites = list(dict.fromkeys(place.site for place in study.dictionaries() if place.site.kind != "neurons"))
    if len(sites) != 1:
        raise BadInput(f"{study.folder} has dictionaries of {len(sites)} sites. Name the one to steer with --site.")
    return sites[0]


def _other_findings(folder: Path, site: Site) -> Path:
    """Return the file of findings of another study: at the same site, or its only one."""
    study = Study.open(folder)
    paths, at_site = sorted((study.folder / "steering" / "findings").glob("*.json")), study.findings(site)
    if not paths or (at_site not in paths and len(paths) > 1):
        problem = "findings of several sites, none of them" if paths else "no findings, nor any"
        raise BadInput(f"{folder} has {problem} at {site}. Run difflex findings {folder} first.")
    return at_site if at_site in paths else paths[0]


def _provenance(study: Study, name: str, features: Mapping[str, tuple[DictionaryRef, int]], other: Path | None) -> Provenance:
    by_place: dict[DictionaryRef, dict[str, int]] = {}
    for concept, (place, number) in features.items() if name in BY_FEATURES else ():
        by_place.setdefault(place, {})[concept] = number
    files = {"other findings": file_sha256(other)} if other is not None and name == "size" else {}
    return Provenance.of(study, by_place, files=files)


def _is_current(finding: Finding | None, name: str, config: FindingsConfig, provenance: Provenance) -> bool:
    """Return whether an experiment would give the same finding again: from the same inputs, by the same rule."""
    current = (config, provenance, EXPERIMENTS[name].rule)
    return finding is not None and (finding.config, finding.provenance, finding.rule) == current
