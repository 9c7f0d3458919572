"""What the verbs that steer towards known concepts share: which features detect them, as the dictionary is now."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from difflex.concepts import Matches
from difflex.errors import StaleWork
from difflex.steering import Toolbox
from difflex.store.files import digest
from difflex.study import Place, Study

__all__ = ["Neurons", "matches_of", "neurons_beside"]


def matches_of(study: Study, place: Place) -> Matches | None:
    """What `difflex concepts` found out about a dictionary, None where it was not asked; of one that has changed since, an error.

    What is said of the numbers of its features would be said of others.
    """
    path, weights = study.concepts(*place), study.dictionary(*place) / "dictionary.safetensors"
    if not path.is_file():
        return None
    matches = Matches.load(path)
    if "sha256" not in matches.made_from or not weights.is_file():
        return matches
    if matches.made_from["sha256"] != digest(weights):
        raise StaleWork(f"{path} is of {place} as it was before it changed. difflex concepts holds it against concepts again.")
    return matches


class Neurons(NamedTuple):
    """The neurons of a block as a dictionary, and what they detect."""

    place: Place
    best: Mapping[str, int]
    """The neuron that detects each concept best."""


def neurons_beside(toolbox: Toolbox, place: Place) -> Neurons | None:
    """The neurons of the block of a dictionary, where the study holds them and knows what they detect.

    That stands in a file of their own, or in that of what was held against concepts beside the dictionary.
    """
    study, site, k = toolbox.study, replace(place.site, kind="neurons"), toolbox.dictionary(place).k
    neurons = [each for each in study.dictionaries() if each.site == site]
    there = sorted(neurons, key=lambda each: toolbox.dictionary(each).k != k)
    for known in (*there, Place(site, f"neurons-k{k}")):
        if there and (matches := matches_of(study, known)) is not None:
            findings = matches.clearest.findings
            return Neurons(there[0], {finding.concept.name: finding.best.features[0] for finding in findings})
    return None
