"""Matches kept in files: what is there and made from the same is read, what is missing or made from something else is made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from difflex.dictionaries import Dictionary, DictionaryOrigin, Neurons, fingerprint
from difflex.errors import BrokenFile
from difflex.evaluation.concepts.labelled import LabelledActivations
from difflex.evaluation.concepts.matches import ConceptMatches
from difflex.evaluation.concepts.matching import MatchingConfig, match
from difflex.evaluation.concepts.methods import FeatureMethod, principal_axes, random_directions
from difflex.records import Site

__all__ = ["StoredMatches", "keep"]

MadeFrom = Mapping[str, str | int | float]


class StoredMatches(NamedTuple):
    """Matches, and whether they were made just now."""

    site: Site
    label: str
    """The name of the file."""
    matches: ConceptMatches
    is_new: bool


def keep(
    folders: Mapping[Site, Mapping[str, Path]],
    place: Callable[[Site, str], Path],
    labelled: Callable[[Site], LabelledActivations | None],
    made_from: MadeFrom,
    matching: MatchingConfig = MatchingConfig(),  # noqa: B008 (a constant)
) -> list[StoredMatches]:
    """The matches of all dictionaries in `folders` (by site and label) and of what they must beat, from the files at `place`.

    That is, for each number of active features: principal axes, random directions, and the neurons of the same block where it
    has some. `labelled` is called for the sites alone at which something is missing, one after another, as the activations of one
    may fill the memory; it gives None for a site that the model does not have. `made_from` says what `labelled` labels.
    """
    told = {**made_from, **{f"matching {name}": value for name, value in vars(matching).items()}}
    kept = []
    for site, paths in folders.items():
        work = _MatchInputs(place, told)
        tasks = [*work.dictionaries(site, paths), *work.axes(site, paths)]
        beside = work.neurons(site, paths, folders)
        missing = [task for task in tasks if not task.is_done]
        # Neurons come first: where a site's own files are all there, its neurons' are, if it has any.
        fresh = [*_made([task for task in beside if missing and not task.is_done], labelled, matching)]
        fresh += _made(missing, labelled, matching)
        kept += [
            StoredMatches(task.site, task.label, ConceptMatches.load(task.path), task in fresh)
            for task in [*tasks, *beside]
            if task.is_done
        ]
    return kept


@dataclass(frozen=True, kw_only=True)
class _MatchTask:
    """One method, and the file that its matches go to."""

    site: Site
    label: str
    path: Path
    made_from: dict[str, str | int | float]
    method: Callable[[LabelledActivations], FeatureMethod]

    @property
    def is_done(self) -> bool:
        """Whether the file is there, whole, and made from the same."""
        try:
            return self.path.is_file() and ConceptMatches.load(self.path).made_from == self.made_from
        except BrokenFile:
            return False


def _made(
    tasks: Sequence[_MatchTask], labelled: Callable[[Site], LabelledActivations | None], matching: MatchingConfig
) -> list[_MatchTask]:
    """Those of `tasks`, all of one site, that could be made; their files are written."""
    here = labelled(tasks[0].site) if tasks else None
    if here is None:
        return []
    for task, matches in zip(tasks, match(here, (task.method(here) for task in tasks), matching), strict=True):
        replace(matches, label=task.label, made_from=task.made_from).save(task.path)
    return list(tasks)


class _MatchInputs(NamedTuple):
    """What makes tasks."""

    place: Callable[[Site, str], Path]
    made_from: MadeFrom

    def dictionaries(self, site: Site, paths: Mapping[str, Path]) -> list[_MatchTask]:
        """The dictionaries themselves, known by the checksums of their weights."""
        return [
            self._task(site, label, partial(_loaded, folder), fingerprint=fingerprint(folder)) for label, folder in paths.items()
        ]

    def axes(self, site: Site, paths: Mapping[str, Path]) -> list[_MatchTask]:
        """Axes that nobody trained, with as many active features as each dictionary; random ones as many as the largest has."""
        tasks, sizes = [], _sizes(paths)
        for k, (size, width) in sizes.items():
            if k <= width:
                tasks.append(self._task(site, f"pca-{2 * width}-k{k}", partial(principal_axes, k=k)))
            if k <= size // 2:
                tasks.append(self._task(site, f"random-{size // 2 * 2}-k{k}", partial(random_directions, size=size, k=k)))
        return tasks

    def neurons(self, site: Site, paths: Mapping[str, Path], others: Mapping[Site, Mapping[str, Path]]) -> list[_MatchTask]:
        """The neurons of the same block and stream, but for those that are among the dictionaries themselves."""
        inner = Site(site.path, "neurons", site.stream)
        if site.kind == "neurons":
            return []
        missing = _sizes(paths).keys() - _sizes(others.get(inner, {})).keys()
        return [self._task(inner, f"neurons-k{k}", partial(_neurons, k)) for k in sorted(missing)]

    def _task(self, site: Site, label: str, method: Callable[[LabelledActivations], FeatureMethod], **also: str) -> _MatchTask:
        return _MatchTask(
            site=site, label=label, path=self.place(site, label), made_from={**self.made_from, **also}, method=method
        )


def _sizes(paths: Mapping[str, Path]) -> dict[int, tuple[int, int]]:
    """By number of active features: the largest size, and the width."""
    sizes: dict[int, tuple[int, int]] = {}
    for folder in paths.values():
        config = json.loads((folder / "config.json").read_bytes())
        k, size = int(config["k"]), int(config["size"])
        sizes[k] = max(sizes.get(k, (0, 0)), (size, int(config["width"])))
    return sizes


def _loaded(folder: Path, _: LabelledActivations) -> FeatureMethod:
    return FeatureMethod.of(Dictionary.load(folder))


def _neurons(k: int, labelled: LabelledActivations) -> FeatureMethod:
    return FeatureMethod.of(Neurons(width=labelled.values.shape[1], k=k, origin=DictionaryOrigin(site=labelled.site)))
