"""Measure the features of dictionaries of a study; what is up to date is kept, and a killed run continues."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from difflex.dictionary_config import fingerprint
from difflex.effects import ModelFunctions, Provenance
from difflex.errors import UnknownName
from difflex.features import Book
from difflex.files import folder_lock
from difflex.measures.image_aspects import SimilarityMatrix
from difflex.measures.inputs import read_inputs
from difflex.measures.records import (
    BY_SIMILARITY,
    MEASURES,
    FeatureMeasures,
    FeatureValue,
    MeasureConfig,
    MeasureEstimate,
    MeasureName,
)
from difflex.measures.stages import STAGES, FeatureMeter
from difflex.progress import ProgressBar
from difflex.steering import StudyEditor
from difflex.study import DictionaryRef, Study

BATCH = 8
"""Features after which what is measured is written."""


class MeasuredDictionary(NamedTuple):
    """The measures of a dictionary's features, their file, and whether they were up to date before."""

    path: Path
    measures: FeatureMeasures
    is_reused: bool


def measure_features(
    study: Study,
    names: Sequence[str],
    config: MeasureConfig,
    model: Callable[[], ModelFunctions],
    only: Collection[MeasureName] = (),
    offline: bool = False,
) -> Iterator[MeasuredDictionary]:
    """Measure features of dictionaries of `study` (all with a book, without `names`), and write and yield the results of each.

    `only` names the measures to make. The model, and that of the image similarity, are loaded when they are needed first.
    """
    places = [study.find_dictionary(name) for name in names] or [
        place for place in study.dictionaries() if study.book(*place).is_file()
    ]
    if not places:
        raise UnknownName(f"{study.folder} has no books of features. Run difflex collect to make them.")
    editor, similarity, loaded = StudyEditor(study), SimilarityMatrix(config.similarity, offline=offline), cache(model)
    for place in places:
        path = study.book(*place)
        if not path.is_file():
            raise UnknownName(f"{place} has no book yet. Run difflex collect to make it.")
        with Book.open(path) as book:
            book.verify(fingerprint(study.dictionary(*place)))
            inputs = read_inputs(study, place, book, config)
        meter = FeatureMeter(editor=editor, place=place, config=config, inputs=inputs, model=loaded, similarity=similarity)
        yield _measure(study, place, meter, tuple(only) or tuple(MEASURES))


def _measure(study: Study, place: DictionaryRef, meter: FeatureMeter, measures: Sequence[MeasureName]) -> MeasuredDictionary:
    path = study.measures(*place)
    with folder_lock(path.parent):
        record = _begun(study, place, meter, path)
        if is_reused := all(record.is_complete(measure) for measure in measures):
            return MeasuredDictionary(path, record, is_reused)
        for name, stage in STAGES.items():
            open_measures: list[MeasureName] = [measure for measure in stage.measures if not record.is_complete(measure)]
            if not set(open_measures) & set(measures):
                continue
            if len({record.done.get(measure, 0) for measure in open_measures}) > 1:  # killed, then begun with another similarity
                record = _without(record, open_measures)
            first, items = record.done.get(open_measures[0], 0), meter.inputs.features
            with ProgressBar(total=len(items), initial=first, desc=f"{place}, {name}", unit=" features") as bar:
                for start in range(first, len(items), BATCH):
                    batch = items[start : start + BATCH]
                    values = [stage.measure(meter, item) for item in batch]
                    record = _with_values(record, open_measures, values, start + len(batch))
                    record.save(path)
                    bar.update(len(batch))
    return MeasuredDictionary(path, record, False)


def _begun(study: Study, place: DictionaryRef, meter: FeatureMeter, path: Path) -> FeatureMeasures:
    """Return the measures that were made with the same inputs and settings."""
    features = tuple(item.feature for item in meter.inputs.features)
    provenance = Provenance.of(study, {place: {}}, files={"inputs": meter.inputs.digest})
    obstacles = {measure: meter.obstacle(measure) for measure in MEASURES}
    missing: dict[str, str] = {measure: text for measure, text in obstacles.items() if text}
    new = FeatureMeasures(
        model=study.model, dictionary=str(place), config=meter.config, provenance=provenance, features=features, missing=missing
    )
    old = FeatureMeasures.load(path) if path.is_file() else None
    if old is None or old.provenance != provenance or replace(old.config, similarity=meter.config.similarity) != meter.config:
        return new
    kept = replace(new, values=old.values, done=old.done, estimates=old.estimates)
    return kept if old.config == meter.config else _without(kept, BY_SIMILARITY)


def _without(record: FeatureMeasures, measures: Collection[str]) -> FeatureMeasures:
    """Return the record as if some measures had not been begun."""
    values, done, estimates = (
        {name: part for name, part in parts.items() if name not in measures}
        for parts in (record.values, record.done, record.estimates)
    )
    return replace(record, values=values, done=done, estimates=estimates)


def _with_values(
    record: FeatureMeasures, measures: Sequence[MeasureName], rows: Sequence[Mapping[MeasureName, FeatureValue]], done: int
) -> FeatureMeasures:
    """Return the record with the values of more features."""
    added = {measure: tuple(row[measure] for row in rows if measure in row) for measure in measures}
    values = {**record.values, **{measure: record.values.get(measure, ()) + new for measure, new in added.items()}}
    estimates = {measure: MeasureEstimate.of(values[measure]) for measure in measures if values[measure]}
    counts = record.done | dict.fromkeys(measures, done)
    return replace(record, values=values, done=counts, estimates=record.estimates | estimates)
