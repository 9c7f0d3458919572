"""What the work of the stations costs, told beforehand: floating-point operations, and how fast a station does them.

The shares of the machine's rate below, and the terms that no matrix product explains, were fitted to runs on mini-flux, on two
cores with other work beside: mostly right within a factor of two there, and a first guess elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from difflex.commands.opening import UNTRAINED
from difflex.errors import DifflexError
from difflex.pipeline import ModelProfile, foresee
from difflex.records import Shot, Site
from difflex.store import Store
from difflex.study import Study
from difflex.study.forecast import CostOutlook, DictionaryForecast, StoreForecast

__all__ = [
    "A_POINT",
    "START",
    "dictionaries",
    "drawing",
    "effect",
    "encoding",
    "foreseen",
    "foreseen_like",
    "generating",
    "growing",
    "held",
    "judging",
    "matching",
    "not_here",
    "probing",
    "scaling",
    "seconds",
    "studied",
    "unknown_store",
    "walking",
]

Work = Literal["model", "effect", "training", "encoding", "growing", "concepts"]
EFFICIENCY: Mapping[Work, float] = {
    "model": 0.34,
    "effect": 0.15,
    "training": 0.36,
    "encoding": 0.36,
    "growing": 0.47,
    "concepts": 0.5,
}
"""The share of the rate of a large matrix product that a station reaches."""
START = 1.0
"""Seconds that a command takes before its work begins."""
SCENE = 1e9
"""Drawing a scene of the drawn world costs as much time as so many operations."""
JUDGED = 2.5e8
"""What the judge of the drawn world takes to look at an image, in operations of the model."""
SCALED = 65_536
"""Tokens by which the units of a dictionary's features are measured."""
A_POINT = 220
"""Bytes of a record that one strength of a method takes for a concept; measured on mini-flux."""


def seconds(outlook: CostOutlook, work: Mapping[Work, float]) -> float:
    """What the operations of `work`, and getting to it, take on this machine."""
    return START + sum(operations / (outlook.rate * EFFICIENCY[kind]) for kind, operations in work.items())


def foreseen(
    name: str,
    sites: Iterable[str],
    revision: str | None = None,
    *,
    steps: int | None = None,
    pixels: tuple[int, int] | None = None,
    guidance: float | None = None,
) -> ModelProfile | str:
    """What is foreseen of a model, or why nothing is."""
    try:
        return foresee(name, tuple(sites), revision, steps, pixels, guidance)
    except DifflexError as error:
        return not_here(name, error)


def foreseen_like(shot: Shot, *sites: Site) -> ModelProfile | str:
    """The same of the model of `shot`, in runs like it."""
    same = {"steps": shot.steps, "pixels": shot.pixels, "guidance": shot.guidance}
    return foreseen(shot.model, map(str, sites), _trained(shot.revision), **same)


def studied(outlook: CostOutlook, folder: Path, *sites: Site) -> ModelProfile | str:
    """The same of the model that a study is about, in runs of its own steps, pixels and guidance."""
    known = next((store.shot for (study, _), store in outlook.stores.items() if study == folder), None)
    try:
        about = known or Study.open(folder)
    except DifflexError as error:
        return str(error).split(". ")[0]
    return foreseen(about.model, map(str, sites), _trained(about.revision))


def _trained(revision: str | None) -> str | None:
    """The revision whose configs those of a model are, random weights or not."""
    return None if (revision or "").startswith(UNTRAINED) else revision


def not_here(name: str, error: DifflexError) -> str:
    """Why nothing is known of a model: said shortly where it only has not been fetched."""
    return f"the model {name} is not here" if "could not be read from" in str(error) else str(error).split(". ")[0]


def held(outlook: CostOutlook, folder: Path, site: str | Site) -> StoreForecast | None:
    """What a study holds of a site, or will hold; None where nobody knows."""
    site = Site.parse(site) if isinstance(site, str) else site
    if (folder, site) in outlook.stores:
        return outlook.stores[folder, site]
    try:
        store = Store.open(Study.open(folder).stores()[site])
        return StoreForecast(store.count() + store.count("held-out"), store.tokens, store.width, store.shot(0))
    except (DifflexError, KeyError):
        return None


def unknown_store(folder: Path, site: str | Site) -> str:
    """The sentence for `held` that is None."""
    return f"{site} is not in {folder} yet, and how wide it will be is not known"


def dictionaries(outlook: CostOutlook, folder: Path, asked: Iterable[str]) -> dict[Site, tuple[DictionaryForecast, ...]]:
    """What dictionaries a study has, or will have, at the sites asked for (all, if none is named)."""
    sites = {Site.parse(site) for site in asked}
    found = {site: learned for (study, site), learned in outlook.dictionaries.items() if study == folder}
    return {site: learned for site, learned in found.items() if not sites or site in sites}


def walking(foreseen: ModelProfile, runs: float, prompts: float, steps: int) -> float:
    """Walking runs to their last step kept, which ends at the site, and encoding their prompts."""
    return runs * ((steps - 1) * foreseen.step + foreseen.reached) + prompts * foreseen.prompt


def generating(foreseen: ModelProfile, images: float, steps: int | None = None) -> float:
    """Whole images, each with a prompt of its own, in the steps of `foreseen` or in so many."""
    return images * (foreseen.prompt + (steps or foreseen.shot.steps) * foreseen.step + foreseen.decoded)


def judging(foreseen: ModelProfile, images: float, levels: int = 0) -> float:
    """Looking at images as the judge of the drawn world does, and foretelling them from so many levels of noise."""
    return images * (JUDGED + (foreseen.decoded + levels * foreseen.step if levels else 0.0))


def scaling(learned: DictionaryForecast) -> float:
    """Measuring the units of a dictionary's features."""
    return encoding(learned, SCALED)


def encoding(learned: DictionaryForecast, tokens: float) -> float:
    """One dense product, the gathering of k rows, and what goes on beside it for each token."""
    return tokens * (learned.width * learned.size + 60 * learned.k * learned.width + 1e6)


def growing(learned: DictionaryForecast, tokens: float) -> float:
    """Three passes over the tokens on the way to the threshold: dense products, a Gram matrix, and k equations for each token."""
    width, size, k = learned.width, learned.size, learned.k
    return tokens * (6.0 * width * size + 530.0 * size * k + 3100.0 * k**3 + 9e6)


def effect(foreseen: ModelProfile, shots: int, count: int) -> float:
    """Predictions and finished images under `count` dictionaries, the mean and zero, and plainly."""
    steps = foreseen.shot.steps
    predicted = shots * (steps / 2 + count + 2) * foreseen.step
    return predicted + shots * (count + 3) * (steps * foreseen.step + foreseen.decoded)


def probing(tokens: float, width: int, concepts: int) -> float:
    """A linear probe for each concept, 150 rounds of its learning."""
    return 300.0 * tokens * width * concepts


def matching(tokens: float) -> float:
    """Ranking what one method's features do at so many tokens."""
    return 5e6 * tokens


def drawing(images: int) -> float:
    """Scenes of the drawn world with their masks."""
    return SCENE * images
