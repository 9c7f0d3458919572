"""`difflex neurons`: the neurons of an MLP as a dictionary, beside which all others stand."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

from tyro.conf import Positional, arg

from difflex import dictionaries
from difflex.commands.flags import Numbers
from difflex.errors import BadInput, StaleWork, UnknownName
from difflex.records import Site
from difflex.store import Store
from difflex.study import Command, Study

__all__ = ["NeuronsCommand"]


@final
@dataclass(frozen=True, kw_only=True)
class NeuronsCommand(Command):
    """Put the neurons of blocks into a study as dictionaries, in which nothing is learned: the baseline."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A folder that `difflex harvest` filled."""
    site: Annotated[tuple[str, ...], arg(metavar="SITE...")]
    """Whose neurons: double.18:neurons, single.9:neurons."""
    k: Numbers = (32,)
    """Neurons per token: those that are largest, whatever their sign."""

    def __call__(self) -> list[Path]:
        if not self.site:
            raise BadInput("Name at least one --site, as in double.1:neurons.")
        study = Study.open(self.study)
        stores = study.stores()
        for name in self.site:
            if Site.parse(name) not in stores:
                raise UnknownName.among("The site", name, map(str, stores), "Harvest it first.")
        return [_put(study, Store.open(stores[Site.parse(name)]), k) for name in self.site for k in self.k]


def _put(study: Study, store: Store, k: int) -> Path:
    """Where the neurons of a store's block now are."""
    origin = dictionaries.DictionaryOrigin(site=store.site, model=study.model, revision=study.revision)
    neurons = dictionaries.Neurons(width=store.width, k=k, origin=origin)
    folder = study.dictionary(store.site, neurons.label)
    if (folder / "config.json").is_file():
        there = dictionaries.Dictionary.load(folder)
        if there.origin != origin:
            raise StaleWork(f"{folder} holds neurons of another model. Delete it, then give the same command again.", folder)
    else:
        neurons.save(folder)
    print(f"{folder}: {neurons.size:,} neurons, {k} for a token")
    return folder
