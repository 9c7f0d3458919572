"""Claims of arXiv 2505.24360 about dictionaries, the concepts they match and the model, and their controls."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from statistics import fmean, stdev

from difflex.evaluation import Evaluation
from difflex.records import Site
from difflex.report.claims.claim import Claim, decided, listed
from difflex.report.facts import DictionaryFacts, MatchFacts, StudyFacts
from difflex.report.figures.concepts import mean_ap
from difflex.report.figures.firing import variants
from difflex.report.kinds import AUTOENCODERS, alike
from difflex.report.telling import count, number, percent

__all__ = [
    "better_than_neurons",
    "better_than_untrained_directions",
    "better_than_untrained_model",
    "dead_without_normalisation",
    "itda_rebuilds_better",
    "norms_differ",
    "spectrum_is_concentrated",
]

Both = tuple[DictionaryFacts, Evaluation]
MOST, FEW = 0.5, 0.3
"""More than half are most; few are what the paper calls so, fewer than 30 %."""


def dead_without_normalisation(facts: StudyFacts) -> Claim:
    """Without normalisation most features die, with it few."""
    groups = [[both for both in group if both[0].kind in AUTOENCODERS] for group in variants(facts.evaluated)]
    pairs = [(bare, other) for group in groups for bare, other in product(group, group) if _bare(bare) and _centred(other)]
    holds = all(bare[1].dead_share > MOST and other[1].dead_share < FEW for bare, other in pairs)
    told = [
        f"{bare[0].name}: {percent(bare[1].dead_share)} dead without, {percent(other[1].dead_share)} with normalisation "
        f"({other[0].normalisation})"
        for bare, other in pairs
    ]
    return Claim(
        name="normalisation",
        statement="Without normalisation most features of an autoencoder are dead, with standardising or whitening few are.",
        rule="At every site, kind, k and size trained both ways, more than half of the features are dead without normalisation "
        "and fewer than 30 % with it (the paper: over 99 % and under 30 %). Dead: fired at none of the held-out tokens.",
        verdict=decided(pairs, holds),
        evidence=listed(told, "difflex train STUDY --normalisation none beside the usual one, then difflex evaluate STUDY"),
    )


def _bare(both: Both) -> bool:
    return both[0].normalisation == "none"


def _centred(both: Both) -> bool:
    """Whether its data were brought to mean 0 and deviation 1, as the claim has it."""
    return both[0].normalisation in ("standardise", "whiten")


def itda_rebuilds_better(facts: StudyFacts) -> Claim:
    """At equal size and k an ITDA has the lower FVU."""
    normalised = [both for both in facts.evaluated if not _bare(both)]
    itdas = [both for both in normalised if both[0].kind == "itda"]
    found = [(itda, best) for itda in itdas if (best := _best_autoencoder(itda, normalised)) is not None]
    pairs = [(itda, best, a, b) for itda, best in found if (a := _fvu(itda)) is not None and (b := _fvu(best)) is not None]
    better = sum(a < b for _, _, a, b in pairs)
    told = [f"{itda[0].name}: FVU {number(a)}; {best[0].place.label}: {number(b)}" for itda, best, a, b in pairs]
    summary = [f"ITDA is better in {better} of {count(len(pairs), 'pair')}."] if pairs else []
    return Claim(
        name="itda",
        statement="ITDA rebuilds activations better than an autoencoder of equal size.",
        rule="Every ITDA has a lower FVU in model space than the best autoencoder at the same site, of the same k and a size "
        "within 10 %; only dictionaries that normalise their data.",
        verdict=decided(pairs, better == len(pairs)),
        evidence=listed(told, "difflex train and difflex itda at one k and size, then difflex evaluate STUDY", summary),
    )


def _best_autoencoder(itda: Both, among: Iterable[Both]) -> Both | None:
    equal = [
        both
        for both in among
        if both[0].kind in AUTOENCODERS
        and both[0].place.site == itda[0].place.site
        and both[0].k == itda[0].k
        and alike(both[0].size, itda[0].size)
        and _fvu(both) is not None
    ]
    return min(equal, key=lambda both: _fvu(both) or 0.0, default=None)


def _fvu(both: Both) -> float | None:
    """The FVU in model space; None where it is no number, which is no evidence either way."""
    fvu = both[1].overall.model_space.fvu
    return fvu if fvu is not None and math.isfinite(fvu) else None


def better_than_neurons(facts: StudyFacts, kinds: Sequence[str], said: str) -> Claim:
    """Features of some kinds match known concepts better than neurons."""
    pairs = _pairs(facts, kinds, lambda _, other: other.kind == "neurons")
    return _compared(
        name=f"neurons-{said.lower()}",
        statement=f"{said[0].upper()}{said[1:]} features match known concepts better than neurons do.",
        others="the neurons of the same block",
        pairs=pairs,
        verb="difflex concepts STUDY, at a block that has neurons",
    )


def better_than_untrained_directions(facts: StudyFacts) -> Claim:
    """Dictionaries match known concepts better than axes that nobody trained."""
    pairs = _pairs(
        facts, (*AUTOENCODERS, "itda"), lambda own, other: other.kind in ("pca", "random") and _at_one_site(own, other)
    )
    return _compared(
        name="axes",
        statement="Features match known concepts better than principal axes and random directions do (not in the paper: a "
        "control).",
        others="the principal axes and the random directions of the same site",
        pairs=pairs,
        verb="difflex concepts STUDY",
    )


def better_than_untrained_model(facts: StudyFacts) -> Claim:
    """Dictionaries of the model match known concepts better than those of an untrained one."""
    pairs = _pairs(
        facts,
        (*AUTOENCODERS, "itda"),
        lambda own, other: other.untrained and own.kind == other.kind and _at_one_site(own, other),
    )
    return _compared(
        name="untrained",
        statement="Features match known concepts better than those of an untrained model do (not in the paper: a control).",
        others="the dictionaries of the untrained model at the same site, of the same kind",
        pairs=pairs,
        verb="difflex concepts STUDY CONTROL, then difflex report STUDY --control CONTROL",
    )


def _at_one_site(own: MatchFacts, other: MatchFacts) -> bool:
    """Whether both read the same activations: a block has several sites."""
    return own.matches.site == other.matches.site


def _pairs(
    facts: StudyFacts, kinds: Sequence[str], are_held: Callable[[MatchFacts, MatchFacts], bool]
) -> list[tuple[MatchFacts, MatchFacts]]:
    """Trained dictionaries of these kinds, and what is held beside each at the same block with the same k."""
    found = []
    for there in facts.blocks.values():
        own = [each for each in there if each.is_trained and each.kind in kinds and each.normalisation != "none"]
        found += [(each, other) for each, other in product(own, there) if are_held(each, other) and other.k == each.k]
    return found


def _compared(*, name: str, statement: str, others: str, pairs: Sequence[tuple[MatchFacts, MatchFacts]], verb: str) -> Claim:
    """The claim that in each of `pairs` the first matches known concepts better."""
    found = [(own, other, gain) for own, other in pairs if (gain := _gain(own, other)) is not None]
    better = sum(low > 0 for _, _, (_, low, _) in found)
    told = [f"{own.path}, {_against(own)}; {_against(other)}; difference {_signed(gain)}" for own, other, gain in found]
    summary = [f"Better in {better} of {count(len(found), 'comparison')}."] if found else []
    return Claim(
        name=name,
        statement=statement,
        rule=f"In every comparison with {others}, at the same k, the best features' AP is higher in the mean over concepts: the "
        "95 % interval of the difference (1.96 standard errors over concepts, paired) lies above 0. Only dictionaries that "
        "normalise their data.",
        verdict=decided(found, better == len(found)),
        evidence=listed(told, verb, summary),
    )


def _gain(own: MatchFacts, other: MatchFacts) -> tuple[float, float, float] | None:
    """How much higher the best features' AP is in the mean over the concepts that both have, and its 95 % interval."""
    ours, theirs = (
        {finding.concept: finding.best.ap.value for finding in each.matches.clearest.findings} for each in (own, other)
    )
    gains = [ours[concept] - theirs[concept] for concept in ours if concept in theirs]
    gains = [gain for gain in gains if math.isfinite(gain)]
    if len(gains) < 2:
        return None
    mean, half = fmean(gains), 1.96 * stdev(gains) / math.sqrt(len(gains))
    return mean, mean - half, mean + half


def _signed(gain: tuple[float, float, float]) -> str:
    mean, low, high = gain
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def _against(each: MatchFacts) -> str:
    level = each.matches.clearest
    share = level.coverage
    detected = f"{percent(share.value)} detected ({percent(share.low)} to {percent(share.high)})"
    return f"{each.name}: mean AP {number(mean_ap(level.findings))}, {detected}"


def norms_differ(facts: StudyFacts) -> Claim:
    """Norms differ from layer to layer and from step to step."""
    norms = facts.anatomy.norms if facts.anatomy is not None else {}
    kept = {site: _finite(by) for site, by in norms.items() if site.kind == "residual" and len(_finite(by)) > 1}
    streams = {stream: {site: by for site, by in kept.items() if site.stream == stream} for stream in ("image", "text")}
    told, holds = [], True
    for stream, by_site in streams.items():
        if len(by_site) < 2:
            continue
        layers, steps = _over_layers(by_site), _over_steps(by_site)
        holds = holds and layers >= 2 and steps >= 1.1
        told.append(
            f"{stream}: the largest over the smallest norm is {layers:.3g} over layers and up to {steps:.3g} over timesteps"
        )
    return Claim(
        name="norms",
        statement="The norms of activations differ between layers and between timesteps.",
        rule="In each stream, at some timestep the longest layer's mean norm is at least twice the shortest's, and in some "
        "layer the longest timestep's at least 1.1 times the shortest's.",
        verdict=decided(told, holds),
        evidence=listed(
            told, f"difflex anatomy {facts.study.model} --prompts FILE --out STUDY, at two layers and two steps or more"
        ),
    )


def _finite(by_timestep: dict[float, float]) -> dict[float, float]:
    return {timestep: norm for timestep, norm in by_timestep.items() if math.isfinite(norm) and norm > 0}


def _over_layers(by_site: dict[Site, dict[float, float]]) -> float:
    timesteps = {timestep for by in by_site.values() for timestep in by}
    columns = [[by[timestep] for by in by_site.values() if timestep in by] for timestep in timesteps]
    return max(max(column) / min(column) for column in columns)


def _over_steps(by_site: dict[Site, dict[float, float]]) -> float:
    return max(max(by.values()) / min(by.values()) for by in by_site.values())


def spectrum_is_concentrated(facts: StudyFacts) -> Claim:
    """Few principal directions hold most of the variance."""
    shapes = facts.anatomy.shapes if facts.anatomy is not None else {}
    shares = {}
    for site, shape in shapes.items():
        few = max(len(shape.variances) // 10, 1)
        if len(shape.variances) >= 10 and math.isfinite(shape.share(few)) and sum(shape.variances) > 0:
            shares[site] = (few, shape)
    told = [
        f"{site}: {percent(shape.share(few))} of the variance in {few} of {len(shape.variances)} directions; 90 % in "
        f"{shape.components_for_90}"
        for site, (few, shape) in shares.items()
    ]
    return Claim(
        name="spectrum",
        statement="The spectrum is concentrated: few principal directions hold most of the variance.",
        rule="At every site measured, a tenth of the principal directions holds more than half of the variance (of a round "
        "cloud it would hold a tenth).",
        verdict=decided(shares, all(shape.share(few) > MOST for few, shape in shares.values())),
        evidence=listed(told, f"difflex anatomy {facts.study.model} --prompts FILE --out STUDY"),
    )
