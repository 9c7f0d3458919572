"""Claims of arXiv 2505.24360 about dictionaries, the concepts that their features match, and the model, with their controls."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean, stdev
from typing import Literal

from difflex.report.facts import DictionaryFacts, MatchFacts, StudyFacts, similar_size
from difflex.report.figures.concepts import mean_ap
from difflex.report.figures.dictionaries import normalisation_variants, without_normalisation
from difflex.report.style import SAE_KINDS, count, number, percent

MOST, FEW = 0.5, 0.3
"""More than half are most; fewer than 30 % are few, as in the paper."""
PAIRS = 2
"""How many comparisons must agree to decide a claim: one training of each kind may be an exception."""
Verdict = Literal["holds here", "does not hold here", "undecided", "not measured"]


@dataclass(frozen=True)
class Claim:
    """A claim with its rule, its verdict and the numbers."""

    name: str
    statement: str
    rule: str
    """When it holds."""
    outcomes: Sequence[bool | None]
    """Of each comparison: whether it supports the claim; None if its numbers cannot tell."""
    numbers: Sequence[str]
    """A line for each comparison."""
    command: str
    """Measures it."""
    least: int = PAIRS
    """How many comparisons must agree."""

    @property
    def verdict(self) -> Verdict:
        """Whether it holds in this study; decided only where enough comparisons agree."""
        if not self.outcomes:
            return "not measured"
        if None in self.outcomes or len({*self.outcomes}) > 1 or len(self.outcomes) < self.least:
            return "undecided"
        return "holds here" if self.outcomes[0] else "does not hold here"

    @property
    def evidence(self) -> tuple[str, ...]:
        """The numbers, or the command that is missing."""
        return tuple(self.numbers) or (f"Missing: {self.command}.",)


def kinds_of(facts: StudyFacts) -> dict[str, tuple[str, ...]]:
    """Return the kinds of dictionaries that claims are about, by name: SAEs, and ITDA if the study has one."""
    kinds: dict[str, tuple[str, ...]] = {"SAE": SAE_KINDS}
    return kinds | ({"ITDA": ("itda",)} if any(d.kind == "itda" for d in facts.dictionaries) else {})


def dictionary_claims(facts: StudyFacts) -> list[Claim]:
    """Return the claims about the dictionaries and the concepts that their features match; one for each kind of dictionary."""
    compared = [
        claim(facts, kinds, name)
        for claim in (_better_than_neurons, _better_than_untrained_directions, _better_than_untrained_model)
        for name, kinds in kinds_of(facts).items()
    ]
    return [_dead_without_normalisation(facts), _itda_reconstructs_better(facts), *compared]


def model_claims(facts: StudyFacts) -> list[Claim]:
    """Return the claims about the activations of the model."""
    return [_norms_differ(facts), _spectrum_is_concentrated(facts)]


def _dead_without_normalisation(facts: StudyFacts) -> Claim:
    """Judge that most features die without normalisation, and few with it."""
    groups = [[d for d in group if d.kind in SAE_KINDS] for group in normalisation_variants(facts.evaluated)]
    pairs = [
        (bare, other)
        for group in groups
        for bare, other in product(group, group)
        if bare.normalisation == "none" and other.normalisation in ("standardise", "whiten")
    ]
    return Claim(
        "normalisation",
        "Without normalisation most features of an SAE are dead, with standardising or whitening few are.",
        "At every site, kind, k and size trained both ways, more than half of the features are dead without normalisation "
        "and fewer than 30 % with it (the paper: over 99 % and under 30 %), in two comparisons or more. Dead: fired at none of "
        "the "
        "held-out tokens.",
        outcomes=[bare.metrics.dead_share > MOST and other.metrics.dead_share < FEW for bare, other in pairs],
        numbers=[
            f"{bare.name}: {percent(bare.metrics.dead_share)} dead without, {percent(other.metrics.dead_share)} with "
            f"normalisation ({other.normalisation})"
            for bare, other in pairs
        ],
        command=without_normalisation(facts),
    )


def _itda_reconstructs_better(facts: StudyFacts) -> Claim:
    """Judge that an ITDA has a lower FVU than the best SAE of equal size and k."""
    normalised = [
        (d, d.fvu) for d in facts.evaluated if d.normalisation != "none" and d.fvu is not None and math.isfinite(d.fvu)
    ]  # an FVU of NaN is no evidence either way
    lines: list[str] = []
    better: list[bool] = []
    for itda, fvu in normalised:
        saes = [(best, sae) for sae, best in normalised if _is_equal_sae(itda, sae)] if itda.kind == "itda" else []
        if saes:
            best, sae = min(saes, key=lambda pair: pair[0])
            better.append(fvu < best)
            lines.append(f"{itda.name}: FVU {number(fvu)}; {sae.ref.label}: {number(best)}")
    return Claim(
        "itda",
        "ITDA reconstructs activations better than an SAE of equal size.",
        "Every ITDA has a lower FVU in model space than the best SAE at the same site, with the same k and a size within 10 %; "
        "only dictionaries that normalise their data. One pair decides nothing: another seed may turn it round.",
        outcomes=better,
        numbers=[f"ITDA is better in {sum(better)} of {count(len(lines), 'pair')}.", *lines] if lines else (),
        command="difflex train and difflex itda at one k and size, then difflex evaluate STUDY",
    )


def _is_equal_sae(itda: DictionaryFacts, sae: DictionaryFacts) -> bool:
    """Return whether it is an SAE of the same site and k and of a similar size."""
    return sae.kind in SAE_KINDS and (sae.ref.site, sae.k) == (itda.ref.site, itda.k) and similar_size(sae.size, itda.size)


def _better_than_neurons(facts: StudyFacts, kinds: Sequence[str], name: str) -> Claim:
    return _comparison(
        f"neurons-{name.lower()}",
        f"{name} features match known concepts better than neurons do.",
        "the neurons of the same block",
        pairs=_pairs(facts, kinds, lambda _, other: other.kind == "neurons"),
        command="difflex concepts STUDY, at a block that has neurons",
    )


def _better_than_untrained_directions(facts: StudyFacts, kinds: Sequence[str], name: str) -> Claim:
    return _comparison(
        f"axes-{name.lower()}",
        f"{name} features match known concepts better than principal axes and random directions do (not in the paper: a "
        "control).",
        "the principal axes and the random directions of the same site",
        pairs=_pairs_at_site(facts, kinds, lambda _, other: other.kind in ("pca", "random")),
        command="difflex concepts STUDY",
    )


def _better_than_untrained_model(facts: StudyFacts, kinds: Sequence[str], name: str) -> Claim:
    return _comparison(
        f"untrained-{name.lower()}",
        f"{name} features match known concepts better than those of an untrained model do (not in the paper: a control).",
        "the dictionaries of the untrained model at the same site, of the same kind",
        pairs=_pairs_at_site(facts, kinds, lambda own, other: other.untrained and own.kind == other.kind),
        command="difflex concepts STUDY CONTROL, then difflex report STUDY --control CONTROL",
        least=1,
    )


MatchPair = tuple[MatchFacts, MatchFacts]
IsBaseline = Callable[[MatchFacts, MatchFacts], bool]


def _pairs_at_site(facts: StudyFacts, kinds: Sequence[str], is_baseline: IsBaseline) -> list[MatchPair]:
    """Return each trained dictionary with each of its baselines at the same site, of the same k; a block has several sites."""
    pairs = _pairs(facts, kinds, is_baseline)
    return [(own, other) for own, other in pairs if own.matches.site == other.matches.site]


def _pairs(facts: StudyFacts, kinds: Sequence[str], is_baseline: IsBaseline) -> list[MatchPair]:
    """Return each trained dictionary of these kinds with each of its baselines at the same block, of the same k."""
    pairs = []
    for matches in facts.blocks.values():
        trained = [m for m in matches if m.is_trained and m.kind in kinds and m.normalisation != "none"]
        pairs += [(own, other) for own, other in product(trained, matches) if is_baseline(own, other) and other.k == own.k]
    return pairs


def _comparison(
    name: str, statement: str, baselines: str, *, pairs: Sequence[MatchPair], command: str, least: int = PAIRS
) -> Claim:
    """Judge that in each pair the first matches known concepts better; a pair whose interval has 0 in it cannot tell."""
    gains = [(own, other, gain) for own, other in pairs if (gain := _gain(own, other)) is not None]
    outcomes = [True if low > 0 else False if high < 0 else None for _, _, (_, low, high) in gains]
    better, worse = outcomes.count(True), outcomes.count(False)
    enough = "two comparisons or more" if least > 1 else "one comparison or more"
    lines = [
        f"{own.path}, {_scores(own)}; {_scores(other)}; difference {mean:+.3f} ({low:+.3f} to {high:+.3f})"
        for own, other, (mean, low, high) in gains
    ]
    return Claim(
        name,
        statement,
        f"In every comparison with {baselines}, at the same k, the best features' AP is higher in the mean over concepts: the "
        f"95 % interval of the difference (1.96 standard errors over concepts, paired) lies above 0, in {enough}. It does not "
        "hold where all intervals lie below 0. Only dictionaries that normalise their data.",
        outcomes=outcomes,
        numbers=[f"Better in {better} of {count(len(gains), 'comparison')}, worse in {worse}.", *lines] if gains else (),
        command=command,
        least=least,
    )


def _gain(own: MatchFacts, other: MatchFacts) -> tuple[float, float, float] | None:
    """Return the mean difference of the best features' AP over the concepts of both, and its 95 % interval."""
    ours, theirs = ({r.concept: r.best.ap.value for r in match.matches.clearest_level.results} for match in (own, other))
    gains = [gain for concept in ours if concept in theirs and math.isfinite(gain := ours[concept] - theirs[concept])]
    return interval_of(gains) if len(gains) > 1 else None


def interval_of(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of two values or more, and its 95 % interval of 1.96 standard errors."""
    mean, half = fmean(values), 1.96 * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def _scores(match: MatchFacts) -> str:
    level = match.matches.clearest_level
    share, low, high = map(percent, level.coverage)
    return f"{match.name}: mean AP {number(mean_ap(level.results))}, {share} detected ({low} to {high})"


def _norms_differ(facts: StudyFacts) -> Claim:
    """Judge that norms differ between layers and between timesteps."""
    ratios = {}
    for stream in ("image", "text"):
        norms = facts.anatomy.norms.items() if facts.anatomy else ()
        own = [by for site, by in norms if site.stream == stream and site.kind == "residual"]
        positive = [{timestep: norm for timestep, norm in by.items() if math.isfinite(norm) and norm > 0} for by in own]
        layers = [by for by in positive if len(by) > 1]
        if len(layers) > 1:
            ratios[stream] = (_layer_ratio(layers), max(max(by.values()) / min(by.values()) for by in layers))
    return Claim(
        "norms",
        "The norms of activations differ between layers and between timesteps.",
        "In each stream, at some timestep the longest layer's mean norm is at least twice the shortest's, and in some "
        "layer the longest timestep's at least 1.1 times the shortest's.",
        outcomes=[all(layers >= 2 and timesteps >= 1.1 for layers, timesteps in ratios.values())] if ratios else (),
        numbers=[
            f"{stream}: the largest over the smallest norm is {layers:.3g} over layers and up to {timesteps:.3g} over timesteps"
            for stream, (layers, timesteps) in ratios.items()
        ],
        command=f"difflex anatomy {facts.study.model} --prompts FILE --out STUDY, at two layers and two steps or more",
        least=1,
    )


def _layer_ratio(layers: Sequence[dict[float, float]]) -> float:
    """Return the largest ratio of norms between layers at one timestep."""
    timesteps = {timestep for by in layers for timestep in by}
    columns = [[by[timestep] for by in layers if timestep in by] for timestep in timesteps]
    return max(max(column) / min(column) for column in columns)


def _spectrum_is_concentrated(facts: StudyFacts) -> Claim:
    """Judge that few principal directions hold most of the variance."""
    lines, shares = [], []
    for site, shape in facts.anatomy.shapes.items() if facts.anatomy else ():
        directions = len(shape.variances)
        few = max(directions // 10, 1)
        share = shape.share(few)
        if directions >= 10 and math.isfinite(share) and sum(shape.variances) > 0:
            shares.append(share)
            within = f"90 % in {shape.components_for_90}"
            lines.append(f"{site}: {percent(share)} of the variance in {few} of {directions} directions; {within}")
    return Claim(
        "spectrum",
        "The spectrum is concentrated: few principal directions hold most of the variance.",
        "At every site measured, a tenth of the principal directions holds more than half of the variance (with equal variances "
        "it would hold a tenth).",
        outcomes=[all(share > MOST for share in shares)] if shares else (),
        numbers=lines,
        command=f"difflex anatomy {facts.study.model} --prompts FILE --out STUDY",
        least=1,
    )
