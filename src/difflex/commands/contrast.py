"""`difflex contrast`: a direction from pairs of prompts, and what features it is made of."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.choices import ContrastMethod as Method
from difflex.commands.flags import Range
from difflex.commands.inputs import load_study_model
from difflex.errors import BadInput
from difflex.pipeline import Pipeline
from difflex.records import Activations, Rectangle, Shot, Site
from difflex.steering import StudyEditor
from difflex.steering.contrast import decompose, find_contrast
from difflex.study import Command, Study

__all__ = ["ContrastCommand", "both_sides", "contrasted", "pairs_in"]

NOISE = 10**6
"""The seed of the first pair."""


@final
@dataclass(frozen=True, kw_only=True)
class ContrastCommand(Command):
    """Find the direction that lies between two sets of prompts at a site; `difflex steer --contrast NAME` goes along it."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study of the model; it need not hold anything yet."""
    name: Annotated[Positional[str], arg(metavar="NAME")]
    """What the direction is to be called."""
    site: Annotated[str, arg(metavar="SITE")]
    """Where: double.18, single.9:update, double.3:text."""
    positive: Annotated[tuple[str, ...], arg(metavar="PROMPT...")] = ()
    """What the direction is to point to."""
    negative: Annotated[tuple[str, ...], arg(metavar="PROMPT...")] = ()
    """What it is to point away from; the first of these is the pair of the first above, and so on."""
    pairs: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(instead of the two above)")] = None
    """A text file with a pair a line: the wanted prompt, a tab, the unwanted one."""
    method: Method = "mean"
    """The mean of the differences, or their first principal component."""
    seeds: Range = range(1)
    """Seeds for each pair; both prompts of a pair begin with the same noise. END is left out."""
    keep_steps: Annotated[Range | None, arg(help_behavior_hint="(default: all)")] = None
    """At which denoising steps activations are compared; END is left out."""
    dictionary: Annotated[str | None, arg(metavar="DICTIONARY", help_behavior_hint="(default: none)")] = None
    """Say which features of this dictionary the direction is made of."""
    batch: Annotated[int, arg(metavar="N")] = 16
    """Images at once."""
    offload: FlagCreatePairsOff[bool] = False
    """Keep on the card only the part at work."""
    offline: FlagCreatePairsOff[bool] = False
    """Take a model of the hub from the local cache alone."""

    def __call__(self) -> list[Path]:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise BadInput(f"'{self.name}' cannot be a file's name. Call the contrast by letters, digits, '.', '_' and '-'.")
        toolbox = StudyEditor(Study.open(self.study))
        pairs = pairs_in(self.pairs) if self.pairs is not None else self._given()
        place = None if self.dictionary is None else toolbox.study.find_dictionary(self.dictionary)
        pipe = load_study_model(toolbox.study, None, self.offload, self.offline)
        site = pipe.site(self.site)
        if place is not None and place.site != site:
            raise BadInput(f"{place} is a dictionary of {place.site}, the contrast is at {site}. Name one of {site}.")
        found = contrasted(pipe, site, pairs, method=self.method, seeds=self.seeds, steps=self.keep_steps, batch=self.batch)
        path = found.save(toolbox.study.contrast(self.name))
        length = float(found.direction.norm())
        print(f"{path}: {found.pairs} pairs, {length:.3g} long, {length / found.norm:.1%} of a mean activation at {site}")
        if place is not None:
            print(f"made of features of {place}:")
            for part in decompose(found.direction, toolbox.dictionary(place)):
                print(f"  {part.feature:>6}  code {part.code:9.3g}  cosine {part.cosine:6.3f}  up to here {part.explained:6.1%}")
        return [path]

    def _given(self) -> list[tuple[str, str]]:
        if not self.positive or len(self.positive) != len(self.negative):
            raise BadInput(
                f"A contrast takes pairs of prompts; there are {len(self.positive)} wanted and {len(self.negative)} unwanted. "
                "Give as many --positive as --negative, or --pairs FILE."
            )
        return list(zip(self.positive, self.negative, strict=True))


def pairs_in(path: Path) -> list[tuple[str, str]]:
    """The pairs in a text file: wanted, tab, unwanted."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--pairs {path} cannot be read: {error}. Name a text file.") from error
    found = []
    for number, line in enumerate(lines, 1):
        wanted, tab, unwanted = line.partition("\t")
        if not line.strip():
            continue
        if not tab or "\t" in unwanted:
            raise BadInput(f"Line {number} of {path} is not two prompts with one tab between them.")
        found.append((wanted.strip(), unwanted.strip()))
    return found


def contrasted(
    pipe: Pipeline,
    site: Site,
    pairs: Iterable[tuple[str, str]],
    *,
    method: Method = "mean",
    seeds: range = range(1),
    steps: range | None = None,
    batch: int = 16,
    region: Callable[[Shot], Rectangle | None] | None = None,
):
    """The contrast between the prompts of `pairs` at `site`, both of a pair from the same noise."""
    return find_contrast(*both_sides(pipe, site, pairs, seeds=seeds, steps=steps, batch=batch), method, region=region)


def both_sides(
    pipe: Pipeline,
    site: Site,
    pairs: Iterable[tuple[str, str]],
    *,
    seeds: range = range(1),
    steps: range | None = None,
    batch: int = 16,
) -> tuple[Iterator[Activations], Iterator[Activations]]:
    """The activations at `site` under the wanted prompts of `pairs`, and under the others, both of a pair from the same noise."""
    pairs = list(pairs)
    plain = list(pipe.shots("", keep_steps=steps))

    def shots(side: int) -> Iterable[Shot]:
        for seed in seeds:
            for number, pair in enumerate(pairs):
                for shot in plain:
                    # Each pair has a noise of its own, so that a prompt may stand in several; and one that no image has
                    # by which the contrast is judged.
                    yield replace(shot, prompt=pair[side], seed=NOISE + seed * len(pairs) + number)

    return pipe.harvest(shots(0), site, batch), pipe.harvest(shots(1), site, batch)
