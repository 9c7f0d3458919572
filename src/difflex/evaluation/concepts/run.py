"""Match the dictionaries of studies and their baselines to concepts; matches that are up to date are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from difflex.devices import free_memory
from difflex.dictionaries import Dictionary, DictionaryOrigin, Neurons, fingerprint
from difflex.dictionary_config import read_config
from difflex.errors import BrokenFile
from difflex.evaluation.concepts.labels import Harvest, LabelledActivations, LabelledSource, LabelledStream, label_batches
from difflex.evaluation.concepts.matching import FeatureMethod, match, principal_axes, random_directions
from difflex.evaluation.concepts.results import ConceptMatches, ConceptsConfig, MatchInputs
from difflex.evaluation.concepts.sources import LabelledImages
from difflex.files import folder_lock
from difflex.records import Site
from difflex.study import DictionaryRef, Study

KEPT_SHARE = 2
"""One part in so many of the free memory may hold activations."""


class StoredMatches(NamedTuple):
    """Matches, their file, and whether they were up to date before."""

    matches: ConceptMatches
    path: Path
    up_to_date: bool


def match_studies(
    studies: Sequence[Study],
    images: LabelledImages,
    open_model: Callable[[Study], Callable[[Site], Harvest | None]],
    config: ConceptsConfig,
    sites: Sequence[str] = (),
    dictionaries: Sequence[str] = (),
    *,
    baselines: bool = True,
) -> list[StoredMatches]:
    """Match dictionaries of `studies`, and the baselines of each, to the concepts of `images`; save the matches.

    These are the dictionaries at `sites` and those called `dictionaries` (SITE/LABEL); all if both are empty. `baselines` are,
    for each number of active features: principal axes, random directions, and the neurons of the same block, if it has some.
    `open_model` returns, for a study, a function from a site to a harvest there, or to None if the model does not have that site;
    it is called only where matches are missing or out of date. Sites are harvested one after another. Activations stay in memory
    if they take at most half of what is free; else they are harvested again at each reading.
    """
    selections = [study.select_dictionaries(sites, dictionaries) for study in studies]
    stored = []
    for study, selection in zip(studies, selections, strict=True):
        inputs = MatchInputs(
            model=study.model,
            revision=study.revision,
            images=images.name,
            config=config,
            precision=study.settings.precision,
            text_length=study.settings.text_length,
        )
        stored += _match_study(study, selection, inputs, partial(_labelled_at, images, open_model(study), config), baselines)
    return stored


def _labelled_at(
    images: LabelledImages, harvest_at: Callable[[Site], Harvest | None], config: ConceptsConfig, site: Site
) -> LabelledStream | None:
    harvest = harvest_at(site)
    if harvest is None:
        return None

    def batches() -> Iterator[LabelledActivations]:
        loaded = (image._replace(prompt="") if config.empty_prompts else image for image in images.load())
        return label_batches(loaded, harvest, images.concepts, config.present_above, config.absent_below)

    return LabelledStream(batches, free_memory("cpu") // KEPT_SHARE)


def _match_study(
    study: Study,
    selection: Sequence[DictionaryRef],
    inputs: MatchInputs,
    labelled_at: Callable[[Site], LabelledStream | None],
    baselines: bool,
) -> list[StoredMatches]:
    folders: dict[Site, list[Path]] = {}
    for place in selection:
        folders.setdefault(place.site, []).append(study.dictionary(*place))
    stored = []
    for site, paths in folders.items():
        own = _dictionary_tasks(study, site, paths, inputs) + (_axis_tasks(study, site, paths, inputs) if baselines else [])
        neurons = _neuron_tasks(study, site, paths, folders, inputs) if baselines else []
        missing = [task for task in own if not task.is_done]
        # Neurons first: if the files of the site itself are up to date, so are those of its neurons, if it has any.
        computed = _compute([task for task in neurons if missing and not task.is_done], labelled_at)
        computed += _compute(missing, labelled_at)
        done = [task for task in (*own, *neurons) if task.is_done]
        stored += [StoredMatches(ConceptMatches.load(task.path), task.path, task not in computed) for task in done]
    return stored


@dataclass(frozen=True)
class _MatchTask:
    """One dictionary or baseline to match."""

    study: Study
    site: Site
    label: str
    inputs: MatchInputs
    method: Callable[[LabelledSource], FeatureMethod] = field(compare=False)

    @property
    def path(self) -> Path:
        """The file of the matches."""
        return self.study.concepts(self.site, self.label)

    @property
    def is_done(self) -> bool:
        """Whether the file exists, is intact, and was computed from the same inputs."""
        try:
            return self.path.is_file() and ConceptMatches.load(self.path).inputs == self.inputs
        except BrokenFile:
            return False


def _compute(tasks: list[_MatchTask], labelled_at: Callable[[Site], LabelledStream | None]) -> list[_MatchTask]:
    """Match the methods of `tasks`, all of one site, and save the results; return none if the model lacks the site."""
    if not tasks:
        return []
    with folder_lock(tasks[0].path.parent):
        labelled = labelled_at(tasks[0].site)
        if labelled is None:
            return []
        results = match(labelled, (task.method(labelled) for task in tasks), tasks[0].inputs.config.matching)
        for task, matches in zip(tasks, results, strict=True):
            replace(matches, label=task.label, inputs=task.inputs).save(task.path)
    return tasks


def _dictionary_tasks(study: Study, site: Site, folders: Sequence[Path], inputs: MatchInputs) -> list[_MatchTask]:
    tasks = []
    for folder in folders:
        method = lambda _, folder=folder: FeatureMethod.of(Dictionary.load(folder))  # noqa: E731
        tasks.append(_MatchTask(study, site, folder.name, replace(inputs, fingerprint=fingerprint(folder)), method))
    return tasks


def _axis_tasks(study: Study, site: Site, folders: Sequence[Path], inputs: MatchInputs) -> list[_MatchTask]:
    """Return axes with as many active features as the dictionaries; random ones as many as the largest dictionary has."""
    tasks = []
    for k, (size, width) in _shapes(folders).items():
        if k <= width:
            tasks.append(_MatchTask(study, site, f"pca-{2 * width}-k{k}", inputs, partial(principal_axes, k=k)))
        if k <= size // 2:
            name = f"random-{size // 2 * 2}-k{k}"
            tasks.append(_MatchTask(study, site, name, inputs, partial(random_directions, size=size, k=k)))
    return tasks


def _neuron_tasks(
    study: Study, site: Site, folders: Sequence[Path], others: Mapping[Site, Sequence[Path]], inputs: MatchInputs
) -> list[_MatchTask]:
    """Return the neurons of the same block and stream, except for those that are dictionaries of the study themselves."""

    def method(source: LabelledSource, k: int) -> FeatureMethod:
        return FeatureMethod.of(Neurons(width=source.width, k=k, origin=DictionaryOrigin(site=source.labels.site)))

    inner = Site(site.path, "neurons", site.stream)
    missing = [] if site == inner else sorted(_shapes(folders).keys() - _shapes(others.get(inner, ())).keys())
    return [_MatchTask(study, inner, f"neurons-k{k}", inputs, partial(method, k=k)) for k in missing]


def _shapes(folders: Iterable[Path]) -> dict[int, tuple[int, int]]:
    """Return the largest size, and the width, by number of active features."""
    shapes: dict[int, tuple[int, int]] = {}
    for config in map(read_config, folders):
        shapes[config.k] = max(shapes.get(config.k, (0, 0)), (config.size, config.width))
    return shapes
