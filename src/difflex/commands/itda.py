"""`difflex itda`: dictionaries made of data."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, final

from tyro.conf import Positional, arg

from difflex.choices import NormalisationMethod, PursuitName
from difflex.dictionaries import Dictionary, DictionaryOrigin
from difflex.dictionaries.itda import ITDA, GrowthConfig, label_suffix, paper_config
from difflex.distributed import Ranks, process_group
from difflex.errors import BadInput, StaleWork, UnknownName
from difflex.files import Json
from difflex.records import Site
from difflex.store import Store
from difflex.study import Command, Study
from difflex.training.itda import GrowthData, GrowthProgress, grow

__all__ = ["ItdaCommand"]

ROOM = 16_384
BATCH = 2048
SECONDS = 10.0
"""Between two lines about a growth that is under way."""


@final
@dataclass(frozen=True, kw_only=True)
class ItdaCommand(Command):
    """Grow ITDA dictionaries from stored activations; given again it goes on; under torchrun processes grow one together."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A folder that `difflex harvest` filled."""
    site: Annotated[str, arg(metavar="SITE")]
    """Whose activations: double.18, single.9:update."""
    k: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 32)")] = None
    """Atoms per token."""
    threshold: Annotated[tuple[float, ...], arg(metavar="SHARE...", help_behavior_hint="(default: found for the size)")] = ()
    """A token becomes an atom when more than this share of it is unexplained; several grow in one pass over the data."""
    size: Annotated[int | None, arg(metavar="N", help_behavior_hint=f"(default: {ROOM} with a threshold)")] = None
    """Where growth ends; without a threshold, the size that the data shall fill."""
    pursuit: Annotated[PursuitName | None, arg(help_behavior_hint="(default: orthogonal, which leaves least)")] = None
    """How codes are found."""
    normalisation: Annotated[NormalisationMethod | None, arg(help_behavior_hint="(default: standardise)")] = None
    """What is done to activations first."""
    paper: bool = False
    """The settings of arXiv 2505.24360 where no flag says otherwise: k 64, threshold 0.6, size 64000, gradient pursuit."""
    tokens: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all training tokens, once)")] = None
    """How many tokens to read in a pass."""
    seed: Annotated[int, arg(metavar="SEED")] = 0
    """The order of the tokens."""

    def __call__(self) -> list[Path]:
        self._check()
        from difflex.devices import use_gpu_of_rank

        use_gpu_of_rank()
        study, site = Study.open(self.study), Site.parse(self.site)
        stores = study.stores()
        if site not in stores:
            raise UnknownName.among("The site", self.site, map(str, stores), "Harvest it first.")
        store = Store.open(stores[site])
        with process_group():
            ranks = Ranks()
            source = self._source(store, ranks)
            training: dict[str, Json] = {"seed": self.seed, **({} if self.tokens is None else {"first": self.tokens})}
            origin = DictionaryOrigin(site=site, model=study.model, revision=study.revision, training=training)
            growths = self._growths(ranks.world_size)
            there = [_there(study, site, growth, source, ranks) for growth in growths]
            missing = [growth for growth, place in zip(growths, there, strict=True) if place is None]
            made = [place for place in there if place is not None]
            if missing:
                asked = {_work(study, site, growth, training): growth for growth in missing}
                grown = grow(asked, source, origin=origin, on_progress=GrowthPrinter())
                made += _put(study, grown) if ranks.rank == 0 else []
        return made

    def _check(self) -> None:
        if not self.threshold and self.size is None and not self.paper:
            raise BadInput("Say when a token becomes an atom (--threshold 0.3) or how many atoms there shall be (--size 8192).")
        for flag, value in (("--size", self.size), ("--tokens", self.tokens)):
            if value is not None and value < 1:
                raise BadInput(f"{flag} {value} grows nothing: ask for 1 or more.")

    def _growths(self, of: int) -> list[GrowthConfig]:
        preset = paper_config() if self.paper else GrowthConfig(size=ROOM)
        flags = {name: getattr(self, name) for name in ("k", "size", "pursuit", "normalisation")}
        given = {name: value for name, value in flags.items() if value is not None}
        growth = replace(preset, batch=max(1, 256 // of), **given)
        return [replace(growth, threshold=threshold) for threshold in self.threshold or (preset.threshold,)]

    def _source(self, store: Store, ranks: Ranks) -> GrowthData:
        rows = store.count("train")
        tokens = rows if self.tokens is None else min(self.tokens, rows)
        share = max(1, BATCH // ranks.world_size)
        return GrowthData(
            batches=lambda start: store.batches(share, seed=self.seed, rank=ranks.rank, world_size=ranks.world_size, start=start),
            tokens=tokens,
            data=f"{store.site} of {store.model}, {tokens} of {rows} tokens, seed {self.seed}, {store.fingerprint}",
            shot=store.shot,
        )


@final
class GrowthPrinter:
    """Says now and then how far a growth is."""

    def __init__(self) -> None:
        self._began = self._said = time.monotonic()

    def __call__(self, progress: GrowthProgress) -> None:
        now = time.monotonic()
        if now - self._said < SECONDS:
            return
        self._said = now
        moment = progress.interval
        speed = moment.tokens / (now - self._began)
        left = max(0.0, progress.tokens - moment.tokens) / max(speed, 1e-9)
        search = f"pass {progress.passes + 1}, " if progress.passes else ""
        print(
            f"threshold {progress.threshold:.3g}: {search}{moment.tokens:,} of {progress.tokens:,} tokens, "
            f"{moment.size:,} atoms, {speed:,.0f} tokens/s, {left / 60:.1f} minutes left",
            flush=True,
        )


def _work(study: Study, site: Site, growth: GrowthConfig, training: Mapping[str, Json]) -> Path:
    """Where a dictionary grows until its size, and so its name, is known."""
    told = label_suffix({**training, "config": growth.as_json()})
    return study.growing_dictionary(site, f"itda-to-{growth.size}-k{growth.k}{told}")


def _there(study: Study, site: Site, growth: GrowthConfig, source: GrowthData, ranks: Ranks) -> Path | None:
    """Where the same dictionary, if it has been grown before, stands; then it is said."""
    for path in sorted(study.dictionary(site, "itda").parent.glob("itda-*/config.json")):
        if _alike(_training(path), growth, source):
            if ranks.rank == 0:
                itda = Dictionary.load(path.parent)
                assert isinstance(itda, ITDA)
                print(f"{path.parent}: is there already, {_described(itda)}")
            return path.parent
    return None


def _training(path: Path) -> Mapping[str, Json]:
    """What a dictionary's file says of its making: nothing where it is damaged, which need not stop the growth of another."""
    try:
        entries = json.loads(path.read_bytes())
    except ValueError:
        return {}
    training = entries.get("training") if isinstance(entries, dict) else None
    return training if isinstance(training, dict) else {}


def _alike(training: Mapping[str, Json], growth: GrowthConfig, source: GrowthData) -> bool:
    """Whether a dictionary that says this of itself was grown as is asked, by however many processes."""
    config = training.get("config")
    same = isinstance(config, dict) and {**config, "batch": growth.batch} == growth.as_json()
    return same and training.get("data") == source.data


def _put(study: Study, made: Mapping[Path, ITDA]) -> list[Path]:
    """Where dictionaries stand once they are moved to their names; one whose name is taken stays where it grew, whole."""
    put: list[Path] = []
    stuck: dict[Path, Path] = {}
    for folder, itda in made.items():
        place = study.dictionary(itda.site, itda.label)
        if place.exists():
            stuck[place] = folder
            continue
        put.append(folder.rename(place))
        print(f"{place}: {_described(itda)}")
    if stuck:
        told = [
            f"{place} is there already, of other data or settings; the new one stands in {new}." for place, new in stuck.items()
        ]
        advice = "Move the old one away, then give the same command again: nothing is grown twice."
        raise StaleWork(" ".join([*told, advice]), next(iter(stuck)))
    return put


def _described(itda: ITDA) -> str:
    told = itda.origin.training
    expected = told["expected_over_threshold"]
    unseen = "" if expected is None else f"; about {expected:.1%} of the tokens of new images should be over it"
    return (
        f"{itda.size:,} atoms over threshold {told['threshold']:.4g} from {told['tokens']:,} tokens{unseen}. "
        f"Worked with {told['backend']}."
    )
