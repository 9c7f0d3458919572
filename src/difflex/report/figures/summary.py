"""A study in five sentences: its model, its dictionaries, what their features detect, what they are worth, what steering does."""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from markupsafe import Markup

from difflex.evaluation.concepts.results import count_detected
from difflex.report.drawing import element
from difflex.report.facts import DictionaryFacts, MatchFacts, StudyFacts
from difflex.report.figures.concepts import mean_ap
from difflex.report.figures.explanations import explained_methods, is_heldout, rated
from difflex.report.figures.gallery import short_name
from difflex.report.style import count, kind_series, listed, number, percent
from difflex.study import DictionaryRef

NAMED = 3
"""Concepts that are named."""


def summary(facts: StudyFacts) -> Markup:
    """Return the sentences that the records of a study allow, as a paragraph."""
    sentences = [
        _model(facts),
        _dictionaries(facts.dictionaries),
        _meaning(facts),
        _reconstruction(facts),
        _steering(facts),
    ]
    return element("p", Markup(" ").join(sentence for sentence in sentences if sentence), class_="summary-text")


def _link(section: str, words: str) -> Markup:
    return element("a", words, href=f"#{section}")


def _model(facts: StudyFacts) -> Markup:
    model, stores = element("b", facts.study.model), facts.stores
    sites = [str(store.site) for store in stores] or list(dict.fromkeys(str(d.ref.site) for d in facts.dictionaries))
    if not sites:
        return Markup("This study is about {}; nothing has been made yet.").format(model)
    where = listed(sites, 4) if len(sites) <= 4 else count(len(sites), "site")
    tokens = sum(store.tokens for store in stores)
    amount = f", {tokens:,} activations" if tokens else ""
    return Markup("{} was read at {}{}.").format(model, where, amount)


def _dictionaries(dictionaries: Sequence[DictionaryFacts]) -> Markup | None:
    if not dictionaries:
        return None
    kinds = Counter(kind_series(d.kind).name for d in dictionaries)
    names = [_counted(number, kind) for kind, number in kinds.items()]
    sizes, ks = sorted({d.size for d in dictionaries}), sorted({d.k for d in dictionaries})
    features = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    active = listed([str(k) for k in ks])
    return Markup("It has {}, of {} features each, of which {} are active at a token.").format(
        _link("reconstruction", listed(names)), features, active.replace(" and ", " or ")
    )


def _counted(number: int, kind: str) -> str:
    """Return a number of dictionaries of a kind, as in `2 TopK SAEs` or `3 ITDA dictionaries`."""
    if kind.endswith("SAE"):
        return count(number, kind)
    return count(number, f"dictionary of {kind}" if kind.islower() else f"{kind} dictionary", _plural(kind))


def _plural(kind: str) -> str:
    return f"dictionaries of {kind}" if kind.islower() else f"{kind} dictionaries"


def _meaning(facts: StudyFacts) -> Markup | None:
    """Return what the features of the best dictionary detect, and how accurate explanations are."""
    parts = [part for part in (_detected(facts), _explained(facts)) if part]
    text = Markup("; ").join(parts)
    return text[:1].upper() + text[1:] + "." if parts else None


def _detected(facts: StudyFacts) -> Markup | None:
    trained = [match for match in facts.matches if match.is_trained]
    if not trained:
        return None

    def rank(match: MatchFacts) -> tuple[int, float]:
        results = match.matches.clearest_level.results
        return count_detected(results)[0], mean_ap(results) or 0.0

    best = max(trained, key=rank)
    results = best.matches.clearest_level.results
    detected, total = count_detected(results)
    clearest = sorted(results, key=lambda result: -result.best.ap.value)[: min(NAMED, detected)]
    name = short_name(facts, DictionaryRef(best.matches.site, best.matches.label))
    if clearest:
        names = listed([result.concept.name for result in clearest])
        return Markup("single features of {} detect {} of {} known concepts (AP 0.8 or more), best {}").format(
            name, _link("concepts", str(detected)), total, names
        )
    chance = fmean(result.chance for result in results) if results else None
    values = f"mean AP {number(mean_ap(results), 2)}, chance {number(chance, 2)}"
    return Markup("no single feature detects any of {} known concepts with AP 0.8, not even of {} ({})").format(
        _link("concepts", str(total)), name, values
    )


def _explained(facts: StudyFacts) -> Markup | None:
    methods = explained_methods(facts.study, facts.books)
    heldout = [method for method in methods if is_heldout(method)] or methods
    if not heldout:
        return None
    best = max(heldout, key=lambda method: method.accuracy.value)
    judged = "held-out" if is_heldout(best) else "the explained"
    rating = f"{rated(best.accuracy)}: " if rated(best.accuracy) else ""
    among = ", the best explained," if len({method.dictionary for method in heldout}) > 1 else ""
    name = next((short_name(facts, ref) for ref in facts.books if str(ref) == best.dictionary), best.dictionary)
    return Markup("explanations of {} features of {}{} are {}{} accurate on {} images (50 % is chance)").format(
        f"{len(best.features):,}", name, among, rating, _link("explanations", percent(best.accuracy.value)), judged
    )


def _reconstruction(facts: StudyFacts) -> Markup | None:
    measured = [(fvu, d) for d in facts.evaluated if d.kind != "neurons" and (fvu := d.fvu) is not None and fvu == fvu]
    if not measured:
        return None
    fvu, best = min(measured, key=lambda pair: pair[0])
    effect = best.metrics.effect
    share = percent(effect.prediction.of_mean) if effect else ""
    model = f"; in place of them it changes the prediction of the model by {share} of what their mean does" if effect else ""
    which = "The best reconstruction" if len(measured) > 1 else "The reconstruction"
    return Markup("{}, by {}, keeps {} of the variance of held-out activations (FVU {}){}.").format(
        which, short_name(facts, best.ref), _link("reconstruction", percent(max(0.0, 1 - fvu))), number(fvu, 2), model
    )


def _steering(facts: StudyFacts) -> Markup | None:
    """Return what adding features does, for the dictionary at which it does most."""
    pairs = [(own, steering) for steering in facts.steering if (own := steering.summary("feature", *steering.groups)) is not None]
    if not pairs:
        return None
    own, steering = max(pairs, key=lambda pair: pair[0].gain)
    curves, random = steering.curves("feature", *steering.groups), steering.summary("random", *steering.groups)
    best = max(curves, key=lambda curve: curve.gain())
    features = _link("steering", f"features of {count(len(curves), 'concept')}")
    if best.gain() <= 0:
        return Markup("Added where the concept is to appear, {} do not make any of them appear.").format(features)
    control = f"; random directions of equal length {percent(random.gain)}" if random else ""
    return Markup(
        "Added where the concept is to appear, {} put it into {} more of the images in the median and, at best, {} into {}{}."
    ).format(features, percent(own.gain), best.concept, percent(best.gain()), control)
