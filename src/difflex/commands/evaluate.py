"""`difflex evaluate`: what the dictionaries of a study are worth on tokens that none of them was trained on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

import difflex
from difflex.commands.opening import load_studied
from difflex.errors import BadInput, UnknownName
from difflex.evaluation import EditedModel, Evaluation, HeldOutData, check_likeness, likeness, renew
from difflex.records import Shot, Site
from difflex.store import Store
from difflex.study import Command, DictionaryRef, Study

__all__ = ["EvaluateCommand"]

Load = Callable[[str | None], "difflex.Pipeline"]
"""From the precision of the weights."""
BATCH, SEED = 1024, 0


@final
@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(Command):
    """Measure dictionaries on held-out activations, and what they do to the model; what is up to date is not done again."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A folder that `difflex harvest`, `difflex train` and `difflex itda` filled."""
    site: Annotated[tuple[str, ...], arg(metavar="SITE...", help_behavior_hint="(default: all of the study)")] = ()
    """All dictionaries of these sites: double.18, single.9:update."""
    dictionary: Annotated[tuple[str, ...], arg(metavar="NAME...", help_behavior_hint="(default: all of the sites)")] = ()
    """These dictionaries, each by SITE/LABEL: double.18/topk-8192-k32."""
    tokens: Annotated[int, arg(metavar="N")] = 1_000_000
    """How many held-out tokens to take; all, where there are fewer."""
    effect_shots: Annotated[int, arg(metavar="N")] = 32
    """At how many held-out shots to measure the effect on the model; 0 leaves it out, and loads no model."""
    measure: Annotated[tuple[str, ...], arg(metavar="NAME...", help_behavior_hint="(default: none)")] = ()
    """How else to compare finished images than by PSNR and SSIM: `clip:` and a CLIP's folder or hub name, or `lpips`."""
    offload: FlagCreatePairsOff[bool] = False
    """Keep on the card only the part of the model at work."""
    offline: FlagCreatePairsOff[bool] = False
    """Take a model of the hub from the local cache alone."""

    def __call__(self) -> list[Path]:
        if self.tokens < 1 or self.effect_shots < 0:
            raise BadInput(
                f"--tokens {self.tokens} --effect-shots {self.effect_shots} cannot be measured: ask for 1 token and 0 shots or more."
            )
        if self.measure and not self.effect_shots:
            raise BadInput(f"--measure {' '.join(self.measure)} compares finished images, of which --effect-shots 0 makes none.")
        for name in self.measure:
            check_likeness(name)
        measures = {name: cache(partial(likeness, name, offline=self.offline)) for name in self.measure}
        study = Study.open(self.study)
        load = cache(lambda precision: load_studied(study, precision, self.offload, self.offline))
        lines: dict[str, dict[str, str]] = {}
        written: list[Path] = []
        for site, places in groupby(self._places(study.dictionaries()), key=lambda place: place.site):
            by_folder = {study.dictionary(*place): place for place in places}
            paths = {folder: study.evaluation(*place) for folder, place in by_folder.items()}
            written += paths.values()
            made = renew(
                paths,
                _held_out(_store(study, site)),
                partial(_model, load, site),
                tokens=self.tokens,
                shots=self.effect_shots,
                measures=measures,
            )
            lines |= {str(by_folder[folder]): _line(renewed.evaluation, self.measure) for folder, renewed in made.items()}
            for folder, renewed in made.items():
                if renewed.kept:
                    print(f"{by_folder[folder]}: up to date")
        print(_table(lines))
        return written

    def _places(self, known: Sequence[DictionaryRef]) -> list[DictionaryRef]:
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


def _store(study: Study, site: Site) -> Store:
    stores = study.stores()
    if site not in stores:
        raise UnknownName.among("The site", str(site), map(str, stores), "It has dictionaries but no activations: harvest it.")
    return Store.open(stores[site])


def _held_out(store: Store) -> HeldOutData:
    """The held-out rows of a store; another harvest is told by its manifest."""
    rows = store.count("held-out")
    return HeldOutData(
        data=f"{rows} held-out tokens of {store.site} of {store.model}, seed {SEED}, {store.fingerprint}",
        batches=lambda: store.batches(BATCH, seed=SEED, split="held-out"),
        shot=store.shot,
        tokens=rows,
        shots=rows // store.tokens,
        mean=store.statistics.mean.float(),
    )


def _model(load: Load, site: Site, shots: Sequence[Shot]) -> EditedModel:
    """What the model makes of `shots`."""
    pipe = load(shots[0].precision)
    return EditedModel(partial(pipe.predictions, shots, site), partial(pipe.images, shots, site))


def _line(evaluation: Evaluation, measures: Sequence[str]) -> dict[str, str]:
    """What the table says of a dictionary, by column."""
    quality, effect = evaluation.overall, evaluation.effect
    model, normalised = quality.model_space, quality.normalised_space or quality.model_space
    psnr, similarity = (effect.psnr, effect.similarity) if effect else (None, {})
    ssim, others = similarity.get("ssim"), {name: similarity.get(name) for name in measures}
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
        **{name: _number(each and each.reconstruction) for name, each in others.items()},
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
