"""What records say where they are not plain: numbers, dictionaries that have changed since, what configs and labels tell."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from difflex.dictionaries import fingerprint
from difflex.dictionaries.files import DictionaryConfig
from difflex.errors import DifflexError
from difflex.evaluation import Evaluation
from difflex.evaluation.concepts import ConceptMatches
from difflex.study import Study

__all__ = ["changed", "is_image", "is_sound", "k_of", "known_in_numbers", "normalisation"]

WORDS = ("difflex", "dictionary", "checksum", "data")
"""What of an evaluation is no number."""


def is_sound(evaluation: Evaluation, config: DictionaryConfig) -> bool:
    """Whether all that should be a number is one (or NaN, which can be told), and the counts are of this dictionary."""
    figures = {name: entry for name, entry in asdict(evaluation).items() if name not in WORDS}
    whole = evaluation.size == config.size > 0 and len(evaluation.density) == len(Evaluation.edges) - 1
    return whole and all(isinstance(each, int | float | None) for each in _leaves(figures))


def changed(study: Study, made_from: Mapping[str, str | int | float]) -> list[str]:
    """The dictionaries among what a record was made from that are no longer what they were."""
    now = {str(place): study.dictionary(*place) for place in study.dictionaries()}
    told = {name: value for name, value in made_from.items() if "/" in name}
    return [name for name, value in told.items() if name not in now or not _is(now[name], value)]


def _is(folder: Path, told: str | int | float) -> bool:
    try:
        return fingerprint(folder) == told
    except (DifflexError, OSError):
        return False  # named where the dictionaries are read


def known_in_numbers(matches: ConceptMatches) -> bool:
    """Whether the figures that are shown are numbers, or NaN, which can be told."""
    shown = [figure for level in matches.levels for each in level.findings for figure in (*each.best.ap, *each.probe)]
    shares = [share for level in matches.levels for share in level.coverage]
    return bool(matches.levels) and all(isinstance(each, int | float) for each in (*shown, *shares, *matches.features.ap))


def is_image(path: Path) -> bool:
    """True; what is no image is an error."""
    with Image.open(path) as file:
        file.load()
    return True


def _leaves(entry: object) -> Iterator[object]:
    inside = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list | tuple) else None
    if inside is None:
        yield entry
        return
    for each in inside:
        yield from _leaves(each)


def normalisation(config: DictionaryConfig) -> str:
    """The method by which a dictionary normalises its data."""
    said = config.settings.get("normalisation")
    method = said.get("method") if isinstance(said, Mapping) else None
    return method if isinstance(method, str) else "none"


def k_of(label: str) -> int:
    """The number of active features that a label tells; 0 where it tells none."""
    return next((int(part[1:]) for part in label.split("-") if part[:1] == "k" and part[1:].isdecimal()), 0)
