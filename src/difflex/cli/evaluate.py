"""`difflex evaluate`: what the dictionaries of a study are worth on tokens that none of them was trained on."""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, NamedTuple, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

import difflex
from difflex.cli import Command
from difflex.dictionary import Dictionary
from difflex.errors import BadInput, UnknownName
from difflex.evaluation import Effect, Evaluation, checksum, effects, evaluate, some_shots
from difflex.records import Site
from difflex.store import Store
from difflex.store.files import digest
from difflex.store.manifest import MANIFEST
from difflex.study import Study

__all__ = ["Evaluate"]

Load = Callable[[str | None], "difflex.Pipeline"]
"""From the precision of the weights."""
BATCH, SEED = 1024, 0
UNTRAINED = "untrained-"


class Place(NamedTuple):
    """Where in a study a dictionary is."""

    site: Site
    label: str

    def __str__(self) -> str:
        return f"{self.site}/{self.label}"


@final
@dataclass(frozen=True, kw_only=True)
class Evaluate(Command):
    """Measure dictionaries on held-out activations, and what they do to the model; what is up to date is not done again."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A folder that `difflex harvest`, `difflex train` and `difflex itda` filled."""
    site: Annotated[tuple[str, ...], arg(metavar="SITE...", help_behavior_hint="(default: all of the study)")] = ()
    """All dictionaries of these sites: double.18, single.9:update."""
    dictionary: Annotated[tuple[str, ...], arg(metavar="NAME...", help_behavior_hint="(default: all of the sites)")] = ()
    """These dictionaries, each by SITE/LABEL: double.18/topk-8192-k32."""
    tokens: Annotated[int, arg(metavar="N")] = 1_000_000
    """How many held-out tokens to take; all, where there are fewer."""
    effect: Annotated[int, arg(metavar="N")] = 32
    """At how many held-out shots to measure the effect on the model; 0 leaves it out, and loads no model."""
    offload: FlagCreatePairsOff[bool] = False
    """Keep on the card only the part of the model at work."""
    offline: FlagCreatePairsOff[bool] = False
    """Take a model of the hub from the local cache alone."""

    def __call__(self) -> None:
        if self.tokens < 1 or self.effect < 0:
            raise BadInput(
                f"--tokens {self.tokens} --effect {self.effect} cannot be measured: ask for 1 token and 0 shots or more."
            )
        study = Study.open(self.study)
        load = cache(partial(_load, study, self.offload, self.offline))
        done: dict[Place, Evaluation] = {}
        for site, places in groupby(self._places(_dictionaries(study)), key=lambda place: place.site):
            done |= self._at_site(study, _store(study, site), list(places), load)
        print(_table({str(place): _line(evaluation) for place, evaluation in done.items()}))

    def _places(self, known: Sequence[Place]) -> list[Place]:
        """Those of the `known` dictionaries that are asked for."""
        if not known:
            raise UnknownName(f"{self.study} has no dictionaries yet. difflex train and difflex itda make them.")
        asked = {str(Site.parse(site)) for site in self.site}
        sites, names = dict.fromkeys(str(place.site) for place in known), [*map(str, known)]
        for what, wanted, there in (("The site", sorted(asked), sites), ("The dictionary", self.dictionary, names)):
            for name in wanted:
                if name not in there:
                    raise UnknownName.among(what, name, there, "difflex train and difflex itda make dictionaries.")
        everything = not asked and not self.dictionary
        return [place for place in known if everything or str(place.site) in asked or str(place) in self.dictionary]

    def _at_site(self, study: Study, store: Store, places: Sequence[Place], load: Load) -> dict[Place, Evaluation]:
        """The evaluations of dictionaries of one site, up to date and saved."""
        rows = store.count("held-out")
        data, shots = _data(store, min(self.tokens, rows)), min(self.effect, rows // store.tokens)
        kept = {place: Evaluation.kept(study.evaluation(*place), study.dictionary(*place), data) for place in places}
        done = {place: found or _measured(study, store, place, self.tokens, data) for place, found in kept.items()}
        lacking = [place for place, each in done.items() if shots and (each.effect is None or each.effect.shots < shots)]
        found = _effects(store, [study.dictionary(*place) for place in lacking], shots, load) if lacking else []
        for place, effect in zip(lacking, found, strict=False):
            done[place] = replace(done[place], effect=effect)
            done[place].save(study.evaluation(*place))
        for place in places:
            if kept[place] == done[place]:
                print(f"{place}: up to date")
        return done


def _dictionaries(study: Study) -> list[Place]:
    """The finished dictionaries of a study, numbers in their names in the order of numbers."""
    folders = (path.parent for path in (study.folder / "dictionaries").glob("*/*/config.json"))
    places = [Place(Site.parse(folder.parent.name.replace("+", ":")), folder.name) for folder in folders]
    finished = [place for place in places if not place.label.startswith("growing-")]
    return sorted(finished, key=lambda place: [part.zfill(12) for part in re.split(r"(\d+)", str(place))])


def _store(study: Study, site: Site) -> Store:
    stores = study.stores()
    if site not in stores:
        raise UnknownName.among("The site", str(site), map(str, stores), "It has dictionaries but no activations: harvest it.")
    return Store.open(stores[site])


def _data(store: Store, tokens: int) -> str:
    """Which tokens an evaluation is about; another harvest is told by the manifest."""
    held_out, manifest = store.count("held-out"), digest(store.folder / MANIFEST)[:16]
    return f"{store.site} of {store.model}, {tokens} of {held_out} held-out tokens, seed {SEED}, manifest {manifest}"


def _measured(study: Study, store: Store, place: Place, tokens: int, data: str) -> Evaluation:
    """A new evaluation, saved."""
    batches, folder = store.batches(BATCH, seed=SEED, split="held-out"), study.dictionary(*place)
    taken = checksum(folder)  # before the dictionary is read: one that changes meanwhile is then known to be another
    made = evaluate(_read(folder, store), batches, store.shot, tokens=tokens, checksum=taken, data=data, progress=True)
    made.save(study.evaluation(*place))
    return made


def _read(folder: Path, store: Store) -> Dictionary:
    dictionary = Dictionary.load(folder)
    if dictionary.width != store.width:
        raise BadInput(
            f"{folder} is of width {dictionary.width}, the activations in {store.folder} are of width {store.width}: it was made "
            "from others. Train it again, or harvest the activations that it is of."
        )
    return dictionary


def _effects(store: Store, folders: Sequence[Path], count: int, load: Load) -> list[Effect]:
    """What each dictionary does to the model at held-out shots; none, and a warning, where no shot can be walked again."""
    shots = some_shots(store.batches(BATCH, seed=SEED, split="held-out"), store.shot, count, SEED)
    if not shots:
        warnings.warn(
            f"{store.site}: the effect is left out, as the shots are of given pictures and not of prompts.", stacklevel=2
        )
        return []
    dictionaries, pipe = [_read(folder, store) for folder in folders], load(shots[0].precision)
    predictions, pictures = (partial(method, shots, store.site) for method in (pipe.predictions, pipe.pictures))
    return effects(dictionaries, store.statistics.mean.float(), predictions, pictures)


def _load(study: Study, offload: bool, offline: bool, precision: str | None) -> "difflex.Pipeline":
    """The model that is studied, held as it was when it was harvested."""
    revision = study.card.revision or ""
    untrained = int(revision.removeprefix(UNTRAINED)) if revision.startswith(UNTRAINED) else None
    return difflex.load(
        study.card.model,
        precision=precision,
        revision=study.card.revision if untrained is None else None,
        untrained=untrained,
        offload=offload,
        offline=offline,
    )


def _line(evaluation: Evaluation) -> dict[str, str]:
    """What the table says of a dictionary, by column."""
    quality, effect = evaluation.overall, evaluation.effect
    model, normalised = quality.model_space, quality.normalised_space or quality.model_space
    psnr, ssim = (effect.psnr, effect.similarity.get("ssim")) if effect else (None, None)
    return {
        "tokens": f"{quality.tokens:,}",
        "FVU": _number(model.fvu),
        "FVU in z": _number(normalised.fvu),
        "r2": _number(model.r2),
        "EV": _number(model.ev),
        "cosine": _number(model.cosine),
        "L0": f"{quality.l0:.1f}",
        "dead": f"{evaluation.dead_share:.1%}",
        "v / mean": _number(effect and effect.prediction.of_mean),
        "v / zero": _number(effect and effect.prediction.of_zero),
        "PSNR": _number(psnr and psnr.reconstruction, 1),
        "SSIM": _number(ssim and ssim.reconstruction, 3),
    }


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _table(lines: Mapping[str, Mapping[str, str]]) -> str:
    """A line for each dictionary under a line of columns."""
    columns = list(next(iter(lines.values())))
    rows = [["", *columns], *([name, *line.values()] for name, line in lines.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
