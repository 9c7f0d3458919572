"""What the verbs that steer towards known concepts share: which features detect them, as the dictionary is now."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from difflex.dictionaries import fingerprint
from difflex.errors import StaleWork
from difflex.evaluation.concepts import ConceptMatches
from difflex.steering import StudyEditor
from difflex.study import DictionaryRef, Study

__all__ = ["NeuronBaseline", "matches_of", "neurons_beside"]


def matches_of(study: Study, place: DictionaryRef) -> ConceptMatches | None:
    """What `difflex concepts` found out about a dictionary, None where it was not asked; of one that has changed since, an error.

    What is said of the numbers of its features would be said of others.
    """
    path, folder = study.concepts(*place), study.dictionary(*place)
    if not path.is_file():
        return None
    matches = ConceptMatches.load(path)
    if "fingerprint" not in matches.made_from or not (folder / "config.json").is_file():
        return matches
    if matches.made_from["fingerprint"] != fingerprint(folder):
        raise StaleWork(f"{path} is of {place} as it was before it changed. difflex concepts holds it against concepts again.")
    return matches


class NeuronBaseline(NamedTuple):
    """The neurons of a block as a dictionary, and what they detect."""

    place: DictionaryRef
    best: Mapping[str, int]
    """The neuron that detects each concept best."""


def neurons_beside(toolbox: StudyEditor, place: DictionaryRef) -> NeuronBaseline | None:
    """The neurons of the block of a dictionary, where the study holds them and knows what they detect.

    That stands in a file of their own, or in that of what was held against concepts beside the dictionary.
    """
    study, site, k = toolbox.study, replace(place.site, kind="neurons"), toolbox.dictionary(place).k
    neurons = [each for each in study.dictionaries() if each.site == site]
    there = sorted(neurons, key=lambda each: toolbox.dictionary(each).k != k)
    for known in (*there, DictionaryRef(site, f"neurons-k{k}")):
        if there and (matches := matches_of(study, known)) is not None:
            findings = matches.clearest.findings
            return NeuronBaseline(there[0], {finding.concept.name: finding.best.features[0] for finding in findings})
    return None
