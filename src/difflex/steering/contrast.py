"""Directions by contrast: what a site's activations have more of under one set of prompts than under another."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, final

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from difflex.dictionaries import Dictionary
from difflex.errors import BadInput, BrokenFile, UnknownName
from difflex.files import write_file
from difflex.records import Activations, Rectangle, Shot, Site
from difflex.steering.regions import covered

__all__ = ["Contrast", "FeatureContribution", "Inside", "Method", "contrast", "contrasts", "everywhere", "made_of"]

FORMAT = 1
Method = Literal["mean", "principal"]
Inside = Callable[[Shot], Rectangle | None]
"""Which part of the image of a shot counts; None for all of it."""


def everywhere(shot: Shot) -> None:
    """No part of the image of a shot counts more than another."""


class FeatureContribution(NamedTuple):
    """A feature's part in a direction."""

    feature: int
    code: float
    """How much of it, where the parts found so far make up the direction as well as they can."""
    cosine: float
    """Of the direction and what the feature writes."""
    explained: float
    """The share of the direction's squared length that the parts up to this one make up."""


@final
@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A direction at a site, and where it comes from."""

    site: Site
    model: str
    revision: str | None
    method: Method
    pairs: int
    timesteps: tuple[float, ...]
    """At which the activations were read."""
    wanted: tuple[str, ...]
    """The prompts whose side it points to."""
    unwanted: tuple[str, ...]
    norm: float
    """Mean length of an activation among those read."""
    direction: Float[Tensor, " width"]
    """As long as the mean difference: a strength of 1 adds as much as lies between the two sides."""

    def save(self, path: Path) -> Path:
        """`path`, which now holds the contrast."""
        about = {name: value for name, value in asdict(replace(self, direction=torch.empty(0))).items() if name != "direction"}
        said = json.dumps({**about, "site": str(self.site)})
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, save({"direction": self.direction.contiguous()}, {"format": str(FORMAT), "contrast": said}))
        return path

    @classmethod
    def load(cls, path: Path) -> Contrast:
        """The contrast in `path`."""
        if not path.is_file():
            known = sorted(each.stem for each in path.parent.glob("*.safetensors"))
            raise UnknownName.among("The contrast", path.stem, known, "difflex contrast makes one.")
        try:
            with safe_open(path, "pt") as file:
                about, direction = file.metadata() or {}, file.get_tensor("direction")
            if about.get("format") != str(FORMAT):
                raise BrokenFile(f"{path} is of format {about.get('format')}; this difflex reads format {FORMAT}.")
            said = json.loads(about["contrast"])
            frozen = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
            return cls(**{**frozen, "site": Site.parse(said["site"])}, direction=direction)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise BrokenFile(f"{path} is not a contrast ({error}): it is damaged. Make it again.") from error


def contrast(
    wanted: Iterable[Activations],
    unwanted: Iterable[Activations],
    method: Method = "mean",
    steps: Sequence[float] | None = None,
    inside: Inside = everywhere,
) -> Contrast:
    """The direction from `unwanted` to `wanted`, by their activations at one site: pair by pair, in the same order and at the
    same seeds and timesteps (those of `steps` alone, if given).

    Each activation is the mean over a shot's tokens, those `inside` a part of its image; a pair's difference is the mean over
    its timesteps. `mean`: the mean of the differences. `principal`: their first principal component about zero, on the side of
    that mean and as long.
    """
    return contrasts(wanted, unwanted, [None], method, steps, inside)[0]


def contrasts(
    wanted: Iterable[Activations],
    unwanted: Iterable[Activations],
    counts: Iterable[int | None],
    method: Method = "mean",
    steps: Sequence[float] | None = None,
    inside: Inside = everywhere,
) -> list[Contrast]:
    """The same from the first so many pairs alone, for each of `counts`; None for all."""
    ours, theirs = _ContrastSide(wanted, steps, inside), _ContrastSide(unwanted, steps, inside)
    if not ours.means or len(ours.means) != len(theirs.means):
        raise BadInput(f"A contrast takes pairs of prompts; it was given {len(ours.means)} and {len(theirs.means)}.")
    if ours.site != theirs.site or ours.timesteps != theirs.timesteps:
        raise BadInput(f"The two sides of a contrast differ in more than prompts: {ours.told} and {theirs.told}.")
    return [_between(ours, theirs, count, method) for count in counts]


def _between(ours: _ContrastSide, theirs: _ContrastSide, count: int | None, method: Method) -> Contrast:
    """The contrast by the first `count` pairs."""
    many = len(ours.means) if count is None else count
    if not 0 < many <= len(ours.means):
        raise BadInput(f"A contrast of {many} pairs was asked for, there are {len(ours.means)}. Ask for 1 to {len(ours.means)}.")
    differences = torch.stack([*ours.means.values()][:many]) - torch.stack([*theirs.means.values()][:many])
    mean = differences.mean(0)
    if not bool(mean.any()):
        raise BadInput(f"The two sides of the contrast do not differ at {ours.site}. Name prompts that do.")
    direction = mean if method == "mean" else _principal(differences, mean)
    return Contrast(
        site=ours.site,
        model=ours.model,
        revision=ours.revision,
        method=method,
        pairs=many,
        timesteps=tuple(sorted(ours.timesteps, reverse=True)),
        wanted=tuple(dict.fromkeys(prompt for prompt, _ in [*ours.means][:many])),
        unwanted=tuple(dict.fromkeys(prompt for prompt, _ in [*theirs.means][:many])),
        norm=(ours.norm + theirs.norm) / 2,
        direction=direction.float(),
    )


class _ContrastSide:
    """The mean activation of each shot's run, in the order of the prompts."""

    def __init__(self, activations: Iterable[Activations], steps: Sequence[float] | None, inside: Inside) -> None:
        sums: dict[tuple[str, int], list[Tensor]] = {}
        norms, self.timesteps, sites = [], set(), set()
        for seen in activations:
            if steps is not None and seen.shots[0].timestep not in steps:
                continue
            sites.add(seen.site)
            self.site, self.model, self.revision = seen.site, seen.shots[0].model, seen.shots[0].revision
            values = seen.values.double()
            norms.append(float(values.norm(dim=-1).mean()))
            for shot, tokens in zip(seen.shots, values, strict=True):
                region = inside(shot) if seen.grid is not None else None
                there = tokens if region is None or seen.grid is None else tokens[covered(region, seen.grid).to(tokens.device)]
                self.timesteps.add(shot.timestep or 0.0)
                sums.setdefault((shot.prompt, shot.seed), []).append(there.mean(0).cpu())
        if len(sites) > 1:
            raise BadInput(f"A contrast is at one site; it was given activations of {', '.join(map(str, sorted(sites)))}.")
        self.means = {shot: torch.stack(each).mean(0) for shot, each in sums.items()}
        self.norm = sum(norms) / max(1, len(norms))

    @property
    def told(self) -> str:
        return f"{self.site} at timesteps {sorted(self.timesteps)}"


def _principal(differences: Float[Tensor, "pair width"], mean: Float[Tensor, " width"]) -> Float[Tensor, " width"]:
    first = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    return first * math.copysign(float(mean.norm()), float(first @ mean))


def made_of(direction: Float[Tensor, " width"], dictionary: Dictionary, parts: int = 10) -> list[FeatureContribution]:
    """What features make up `direction`: found one after another, each time the one that has most in common with what is left,
    with a code above 0; the codes of all are then fitted anew."""
    if len(direction) != dictionary.width:
        raise BadInput(f"{dictionary.name} has activations of width {dictionary.width}, the direction has {len(direction)}.")
    unit, x = dictionary.directions.double(), direction.double()
    chosen: list[int] = []
    found: list[tuple[int, float]] = []
    weights, left = torch.empty(0), x
    while len(chosen) < min(parts, dictionary.size):
        common = unit @ left
        common[chosen] = -math.inf
        best = int(common.argmax())
        if float(common[best]) <= 1e-9 * float(x.norm()):
            break
        chosen.append(best)
        weights = torch.linalg.lstsq(unit[chosen].T, x[:, None]).solution[:, 0]
        left = x - weights @ unit[chosen]
        found.append((best, 1 - float(left.square().sum() / x.square().sum())))
    lengths = dictionary.decoder_of(torch.tensor(chosen, dtype=torch.long, device=unit.device)).norm(dim=1).double()
    cosines = unit @ (x / x.norm())
    return [
        FeatureContribution(feature, float(weight / length), float(cosines[feature]), explained)
        for (feature, explained), weight, length in zip(found, weights, lengths, strict=True)
    ]
