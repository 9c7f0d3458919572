"""`difflex itda`: dictionaries made of data."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

from tyro.conf import Positional, arg

from difflex.cli import Command
from difflex.dictionary import Dictionary, Origin
from difflex.dictionary.itda import ITDA, Growth, Progress, Source, grow, paper
from difflex.dictionary.normalisation import Method
from difflex.dictionary.pursuit import Way
from difflex.errors import BadInput, UnknownName
from difflex.ranks import Ranks, joined
from difflex.records import Site
from difflex.store import Store
from difflex.study import Study

__all__ = ["Itda"]

ROOM = 16_384
BATCH = 2048
SECONDS = 10.0
"""Between two lines about a growth that is under way."""


@final
@dataclass(frozen=True, kw_only=True)
class Itda(Command):
    """Grow ITDA dictionaries from stored activations; given again it goes on; under torchrun processes grow one together."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A folder that `difflex harvest` filled."""
    site: Annotated[str, arg(metavar="SITE")]
    """Whose activations: double.18, single.9:update."""
    k: Annotated[int, arg(metavar="N")] = 32
    """Atoms per token."""
    threshold: Annotated[tuple[float, ...], arg(metavar="SHARE...", help_behavior_hint="(default: found for the size)")] = ()
    """A token becomes an atom when more than this share of it is unexplained; several grow in one pass over the data."""
    size: Annotated[int | None, arg(metavar="N", help_behavior_hint=f"(default: {ROOM} with a threshold)")] = None
    """Where growth ends; without a threshold, the size that the data shall fill."""
    pursuit: Way = "orthogonal"
    """How codes are found; the default leaves least."""
    normalisation: Method = "standardise"
    """What is done to activations first."""
    paper: bool = False
    """The pursuit and normalisation of arXiv 2505.24360."""
    tokens: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all training tokens, once)")] = None
    """How many tokens to read in a pass."""
    seed: Annotated[int, arg(metavar="SEED")] = 0
    """The order of the tokens."""

    def __call__(self) -> None:
        if not self.threshold and self.size is None:
            raise BadInput("Say when a token becomes an atom (--threshold 0.3) or how many atoms there shall be (--size 8192).")
        study, site = Study.open(self.study), Site.parse(self.site)
        stores = study.stores()
        if site not in stores:
            raise UnknownName.among("The site", self.site, map(str, stores), "Harvest it first.")
        store = Store.open(stores[site])
        with joined():
            ranks = Ranks()
            source = self._source(store, ranks)
            asked = {_work(study, site, growth): growth for growth in self._growths(ranks.count)}
            missing = {folder: growth for folder, growth in asked.items() if not _there(study, site, growth, source, ranks)}
            if not missing:
                return
            origin = Origin(site=site, model=study.card.model, revision=study.card.revision, training={"seed": self.seed})
            made = grow(missing, source, origin=origin, told=Teller())
            if ranks.rank == 0:
                for folder, itda in made.items():
                    _put(study, folder, itda)

    def _growths(self, of: int) -> list[Growth]:
        grown = [
            Growth(
                k=self.k,
                threshold=threshold,
                size=self.size or ROOM,
                pursuit=self.pursuit,
                normalisation=self.normalisation,
                batch=max(1, 256 // of),
            )
            for threshold in self.threshold or (None,)
        ]
        return [paper(growth) for growth in grown] if self.paper else grown

    def _source(self, store: Store, ranks: Ranks) -> Source:
        rows = store.count("train")
        tokens = min(self.tokens or rows, rows)
        share = max(1, BATCH // ranks.count)
        return Source(
            batches=lambda start: store.batches(share, seed=self.seed, rank=ranks.rank, of=ranks.count, start=start),
            tokens=tokens,
            data=f"{store.site} of {store.model}, {tokens} of {rows} tokens, seed {self.seed}",
            shot=store.shot,
        )


@final
class Teller:
    """Says now and then how far a growth is."""

    def __init__(self) -> None:
        self._began = self._said = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._said < SECONDS:
            return
        self._said = now
        moment = progress.moment
        speed = moment.tokens / (now - self._began)
        left = max(0.0, progress.tokens - moment.tokens) / max(speed, 1e-9)
        search = f"pass {progress.passes + 1}, " if progress.passes else ""
        print(
            f"threshold {progress.threshold:.3g}: {search}{moment.tokens:,} of {progress.tokens:,} tokens, "
            f"{moment.size:,} atoms, {speed:,.0f} tokens/s, {left / 60:.1f} minutes left",
            flush=True,
        )


def _work(study: Study, site: Site, growth: Growth) -> Path:
    """Where a dictionary grows until its size, and so its name, is known."""
    aim = f"to-{growth.size}" if growth.threshold is None else f"over-{growth.threshold:g}-to-{growth.size}"
    return study.dictionary(site, f"growing-itda-{aim}-k{growth.k}-{growth.pursuit}-{growth.normalisation}")


def _there(study: Study, site: Site, growth: Growth, source: Source, ranks: Ranks) -> bool:
    """Whether the same dictionary has been grown before; then it is said."""
    for path in sorted(study.dictionary(site, "itda").parent.glob("itda-*/config.json")):
        training = json.loads(path.read_bytes()).get("training", {})
        if training.get("config") == growth.as_json() and training.get("data") == source.data:
            if ranks.rank == 0:
                itda = Dictionary.load(path.parent)
                assert isinstance(itda, ITDA)
                print(f"{path.parent}: is there already, {_described(itda)}")
            return True
    return False


def _put(study: Study, folder: Path, itda: ITDA) -> None:
    """Move a dictionary from where it grew to its name."""
    place = study.dictionary(itda.site, itda.label)
    if place.exists():
        raise BadInput(f"{place} is there already and was grown otherwise; the new one stands in {folder}. Move one of them.")
    folder.rename(place)
    print(f"{place}: {_described(itda)}")


def _described(itda: ITDA) -> str:
    told = itda.origin.training
    return (
        f"{itda.size:,} atoms over threshold {told['threshold']:.4g} from {told['tokens']:,} tokens; about "
        f"{told['expected_over']:.1%} of new tokens should be over it. Worked with {told['means']}."
    )
