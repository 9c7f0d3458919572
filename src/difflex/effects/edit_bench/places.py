"""The places of the editing benchmark: which representations of a study are transferred, and at which sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from difflex.effects.edit_bench.results import EditArm, EditBenchConfig
from difflex.effects.edit_bench.transfer import Method
from difflex.errors import UnknownName
from difflex.records import Site
from difflex.study import DictionaryRef, Study

T = TypeVar("T")


class TransferPlace(NamedTuple):
    """What is transferred, and the sites at which it is."""

    method: Method
    sites: tuple[Site, ...]
    dictionaries: tuple[DictionaryRef, ...] = ()

    @property
    def name(self) -> str:
        """The sites joined by commas, and after a slash the label of the dictionaries, or the label of each."""
        labels = [ref.label for ref in self.dictionaries]
        labels = labels[:1] if len(set(labels)) == 1 else labels
        return "/".join(",".join(part) for part in (map(str, self.sites), labels) if part)

    def counts(self, config: EditBenchConfig) -> tuple[int | None, ...]:
        """Return how many parts are transferred, in turn."""
        counts: dict[Method, tuple[int | None, ...]] = {"features": config.features, "neurons": config.neurons}
        return tuple(dict.fromkeys(counts.get(self.method, (None,))))

    def arms(self, config: EditBenchConfig) -> list[EditArm]:
        """Return the arms at this place."""
        settings = [(count, strength) for count in self.counts(config) for strength in config.strengths]
        return [EditArm(self.method, self.name, count, float(strength)) for count, strength in dict.fromkeys(settings)]


def transfer_places(study: Study, config: EditBenchConfig) -> list[TransferPlace]:
    """Return the places of all methods: the named dictionaries and sites, by default those of the study."""
    sets = _dictionary_sets(study, config)
    named = [tuple(Site.parse(part) for part in name.split(",")) for name in config.sites]
    of_neurons = [sites for sites in named if all(site.kind == "neurons" for site in sites)]
    whole = [sites for sites in named if sites not in of_neurons]
    if not named:
        of_neurons = [(site,) for site in dict.fromkeys(ref.site for ref in study.dictionaries()) if site.kind == "neurons"]
    if not whole:
        whole = [tuple(ref.site for ref in refs) for refs in sets]
    places = {
        "features": [TransferPlace("features", tuple(ref.site for ref in refs), refs) for refs in dict.fromkeys(sets)],
        "neurons": [TransferPlace("neurons", sites) for sites in dict.fromkeys(of_neurons)],
        "activations": [TransferPlace("activations", sites) for sites in dict.fromkeys(whole)],
        "contrast": [TransferPlace("contrast", sites) for sites in dict.fromkeys(whole)],
    }
    chosen = [place for method in config.methods for place in places[method]]
    if not chosen:
        raise UnknownName(
            f"{study.folder} has no dictionaries for the methods {', '.join(config.methods)}. Make some with difflex train or "
            "difflex itda, or name sites with --site."
        )
    return chosen


def _dictionary_sets(study: Study, config: EditBenchConfig) -> list[tuple[DictionaryRef, ...]]:
    if config.dictionaries:
        return [tuple(study.find_dictionary(part) for part in name.split(",")) for name in config.dictionaries]
    known = study.dictionaries()
    sites = [str(ref.site) for ref in known if ref.site.kind != "neurons" and not ref.site.smooth]
    named = [str(Site.parse(part)) for name in config.sites for part in name.split(",")]
    sites = [site for site in dict.fromkeys(sites) if not named or site in named]
    by_kind: dict[str, list[DictionaryRef]] = {}
    for ref in study.select_largest(sites, ()) if sites else ():
        by_kind.setdefault(ref.label.partition("-")[0], []).append(ref)
    return [refs for own in by_kind.values() for refs in _alone_and_together(own)]


def _alone_and_together(places: Sequence[T]) -> list[tuple[T, ...]]:
    """Return each place on its own, and then all at once."""
    return [*((place,) for place in places), *([tuple(places)] if len(places) > 1 else [])]
