"""The roles of blocks: which groups of concepts each block of a model represents, and at which noise levels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from difflex.evaluation.concepts.results import DETECTED, ConceptResult, ConceptsConfig, NoiseLevelResult
from difflex.records import Site
from difflex.report.drawing import Drawing, element, shortened
from difflex.report.drawing.heat import HeatCell, HeatColumn, HeatGroup, heat_groups
from difflex.report.facts import MatchFacts, StudyFacts, group_by
from difflex.report.figures import MissingFigure, ReportFigure, html_table
from difflex.report.style import SAE_KINDS, count, number

PROBE_NAME = "a linear probe"
USUAL_LEVELS = (0.25, 0.5, 0.75)
"""The noise levels that are suggested where only one was measured."""
LISTED = 6
"""Sites that are named in a sentence, at most."""


class Role(NamedTuple):
    """How well a block shows a group of concepts at one noise level: by the best features of its dictionary, or to a probe."""

    block: str
    method: str
    group: str
    noise: str
    results: Sequence[ConceptResult]
    probe: bool

    @property
    def aps(self) -> list[float]:
        """The average precision of each concept."""
        return [(result.probe if self.probe else result.best.ap).value for result in self.results]

    @property
    def mean(self) -> float:
        """Their mean."""
        return sum(self.aps) / len(self.aps)

    @property
    def chance(self) -> float:
        """The mean average precision of a random ranking."""
        return sum(result.chance for result in self.results) / len(self.results)

    @property
    def detected(self) -> int:
        """The number of concepts with AP 0.8 or more."""
        return sum(ap >= DETECTED for ap in self.aps)

    @property
    def tip(self) -> str:
        """Its tooltip."""
        place, found = f"{self.group} at {self.block}, noise {self.noise}", f"{self.detected} of {len(self.results)}"
        means = f"mean AP {number(self.mean)}, that of a random ranking {number(self.chance)}"
        return f"{place}\n{means}\n{found} concepts detected\n{self.method}"

    def __str__(self) -> str:
        return (
            f"{shortened(self.block, 84)}, noise {self.noise}: {self.mean:.2f}, {self.detected} of {len(self.results)} detected"
        )


@dataclass(frozen=True)
class BlockRoles:
    """A dictionary of each block, compared with known concepts, in the order of the model."""

    blocks: Mapping[str, MatchFacts]

    @classmethod
    def of(cls, facts: StudyFacts) -> BlockRoles:
        """Return the roles that a study has measured, by dictionaries of one label as far as its blocks have it."""
        tiers = {block: _preferred(matches) for block, matches in facts.blocks.items()}
        labels = Counter(name for matches in tiers.values() for name in {match.name for match in matches})

        def rank(match: MatchFacts) -> tuple[int, float]:
            results = match.overall.results
            return labels[match.name], sum(result.best.ap.value for result in results)

        return cls({block: max(tiers[block], key=rank) for block in in_order(facts, tiers)})

    @property
    def levels(self) -> list[str]:
        """The noise levels of any block, the noisiest first."""
        names = {noise for match in self.blocks.values() for noise in levels_of(match)}
        return sorted(names, key=lambda name: [-float(part) for part in name.split(",")] if name != "all" else [1.0])

    @property
    def groups(self) -> list[str]:
        """The groups of concepts of any block."""
        return list(dict.fromkeys(concept.group for match in self.blocks.values() for concept in match.matches.concepts))

    @property
    def label(self) -> str:
        """The label of the dictionaries if they have one in common."""
        labels = {match.name for match in self.blocks.values()}
        return labels.pop() if len(labels) == 1 else "a dictionary"

    @property
    def is_drawn(self) -> bool:
        """Whether there are several blocks or noise levels to compare; else a table is enough."""
        return len(self.blocks) > 1 or len(self.levels) > 1

    def role(self, block: str, group: str, noise: str, probe: bool) -> Role | None:
        """Return the role of a block; None if it was not measured."""
        match = self.blocks[block]
        level = levels_of(match).get(noise)
        results = level.of(group) if level else []
        return Role(block, PROBE_NAME if probe else match.name, group, noise, results, probe) if results else None

    def roles(self, probe: bool, groups: Iterable[str] | None = None) -> list[Role]:
        """Return all roles that were measured, by group, noise level and block."""
        places = ((b, g, n) for g in (self.groups if groups is None else groups) for n in self.levels for b in self.blocks)
        return [role for place in places if (role := self.role(*place, probe)) is not None]

    def clearest(self, group: str, probe: bool = False) -> Role | None:
        """Return the block and the noise level at which a group of concepts is clearest."""
        return max(self.roles(probe, [group]), key=lambda role: role.mean, default=None)

    def drawing(self, probe: bool, title: str = "") -> Drawing:
        """Draw a row for each noise level of each group, and a column for each block."""
        blocks, levels = list(self.blocks), self.levels
        columns = [column_of(block) for block in blocks]
        groups = []
        for group in self.groups:
            rows = [[self.role(block, group, noise, probe) for block in blocks] for noise in levels]
            cells = [[role and HeatCell(role.mean, f"{role.mean:.2f}", role.tip) for role in row] for row in rows]
            best = self.clearest(group, probe)
            framed = (levels.index(best.noise), blocks.index(best.block)) if best else None
            groups.append(HeatGroup(group, str(best or ""), cells, framed))
        title += "linear probe of the activation" if probe else f"best single feature of {self.label}"
        about = f"Mean average precision of {count(len(groups), 'group')} of concepts: in each a row for each noise level, the "
        about += f"noisiest on top, and a column for each of {count(len(blocks), 'block')}. The clearest cell has a frame."
        return heat_groups(title, about, groups, levels, columns, ("noise", "mean AP"))


def roles(facts: StudyFacts) -> list[ReportFigure | MissingFigure]:
    """Return the figure of the roles of all blocks, and what it lacks."""
    own = BlockRoles.of(facts)
    drawings = {"roles-features": own.drawing(probe=False), "roles-probe": own.drawing(probe=True)} if own.is_drawn else {}
    methods = {block: match.name for block, match in own.blocks.items()}
    differ = "; ".join(f"{block}: {name}" for block, name in methods.items()) if len({*methods.values()}) > 1 else ""
    figure = ReportFigure(
        name="roles",
        title="What each block represents, by noise level" if drawings else "",
        caption=(DRAWN if drawings else IN_TABLE) + (f" The dictionaries are not of one label: {differ}." if differ else ""),
        formula="mean over the concepts of a group of AP on held-out images; detected: AP ≥ 0.8",
        columns=ROLE_COLUMNS,
        rows=role_rows(own),
        drawings=list(drawings.values()),
        files=drawings,
    )
    return [figure, *_missing(facts, own)]


DRAWN = (
    "How well each block shows each group of concepts while an image emerges: within a group from pure noise, 1, down towards "
    "the "
    "image, 0, and from the first block on the left to the last. On the one hand by the best single feature of each concept, on "
    "the other to a linear probe of the whole activation, the ceiling. The frame is around the clearest cell, which the words "
    "above it name; it was chosen with hindsight."
)
IN_TABLE = "All digits of the table above."


def role_table(own: BlockRoles) -> Markup:
    """Return what the only block at the only noise level shows, by group of concepts; nothing for several, which are drawn."""
    if own.is_drawn or not own.blocks:
        return Markup()
    rows = []
    for role in own.roles(probe=False):
        probe = own.role(role.block, role.group, role.noise, probe=True)
        detected = f"{role.detected} of {len(role.results)}"
        values = (number(role.mean, 2), number(probe.mean if probe else None, 2), number(role.chance, 2))
        rows.append((role.group, detected, *values))
    heads = ("group of concepts", "detected by one feature", "mean AP", "mean AP of a linear probe", "chance")
    block, noise = next(iter(own.blocks)), own.levels[0]
    title = f"{block} at noise {noise}, by {own.label}"
    return element("h3", title) + html_table(heads, rows, title, words=1)


ROLE_COLUMNS = ("block", "method", "group", "noise", "concepts", "mean AP", "chance", "detected")


def role_rows(own: BlockRoles) -> list[tuple[str | float, ...]]:
    """Return a row for each role, with the columns `ROLE_COLUMNS`."""
    both = [role for probe in (False, True) for role in own.roles(probe)]
    return [(r.block, r.method, r.group, r.noise, len(r.results), r.mean, r.chance, r.detected) for r in both]


def in_order(facts: StudyFacts, blocks: Iterable[str]) -> list[str]:
    """Return blocks in the order of the model: that of its anatomy, else of their names with numbers in numerical order."""
    known = _blocks_of(facts.anatomy.norms if facts.anatomy else ())
    names = sorted(blocks, key=lambda block: re.sub(r"\d+", lambda digits: digits.group().zfill(12), block))
    return sorted(names, key=known.index) if {*names} <= {*known} else names


def levels_of(match: MatchFacts) -> dict[str, NoiseLevelResult]:
    """Return the results of each noise level by its name; `all` for several that are not known."""
    overall, *levels = match.matches.levels
    if levels:
        return {f"{level.noise:g}": level for level in levels}
    inputs = match.matches.inputs
    return {",".join(f"{noise:g}" for noise in inputs.config.noise) if inputs else "all": overall}


def _preferred(matches: Sequence[MatchFacts]) -> Sequence[MatchFacts]:
    """Return the trained SAEs; if there are none other trained dictionaries, else what there is."""
    wishes: tuple[Callable[[MatchFacts], bool], ...] = (
        lambda match: match.is_trained and match.kind in SAE_KINDS,
        lambda match: match.is_trained,
        lambda match: not match.untrained,
    )
    return next((own for wish in wishes if (own := [match for match in matches if wish(match)])), matches)


def _blocks_of(sites: Iterable[Site]) -> list[str]:
    """Return the blocks of sites, in their order."""
    return list(dict.fromkeys(str(Site(site.path, stream=site.stream)) for site in sites))


def column_of(block: str) -> HeatColumn:
    """Return the column of a block: the name that it shares with its neighbours, and its number."""
    site = Site.parse(block)
    shared, _, name = site.path.rpartition(".")
    return HeatColumn(f"{shared}:text" if site.stream == "text" else shared, name)


def _missing(facts: StudyFacts, own: BlockRoles) -> list[MissingFigure]:
    """Return the blocks and noise levels that were not measured, with the commands that measure them."""
    sites = group_by((d.ref.site for d in facts.dictionaries if d.kind != "neurons"), lambda site: _blocks_of([site])[0])
    measured = {block: levels_of(match) for block, match in own.blocks.items()}
    lacking = [block for block in in_order(facts, sites) if {*own.levels} - {*measured.get(block, ())}]
    gaps = []
    if len(own.levels) == 1:
        gaps.append(MissingFigure("Known concepts at several noise levels", _concepts_command(own, ())))
    elif lacking:
        names = [str(site) for block in lacking for site in dict.fromkeys(sites[block])]
        name = f"Known concepts at {_listed(lacking)} at the noise levels {', '.join(reversed(own.levels))}"
        gaps.append(MissingFigure(name, _concepts_command(own, names)))
    rare = {concept.name: None for match in own.blocks.values() for concept in match.matches.rare_concepts}
    if rare:
        name = f"Concepts that too few images show ({_listed([*rare])})"
        gaps.append(MissingFigure(name, _concepts_command(own, (), images=2)))
    known = facts.anatomy.norms if facts.anatomy else ()
    without = [block for block in _blocks_of(site for site in known if site.stream == "image") if block not in sites]
    if without:
        steps = ("harvest MODEL --prompts FILE --out STUDY", "train STUDY")
        command = ", then ".join(f"difflex {step} --site SITE..." for step in steps)
        gaps.append(
            MissingFigure(
                f"Known concepts at blocks without a dictionary ({_listed(without)})",
                f"{command}, then {_concepts_command(own, ['SITE...'])}",
            )
        )
    return gaps


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= LISTED else f"{', '.join(names[: LISTED - 1])} and {len(names) - LISTED + 1} more"


def _concepts_command(own: BlockRoles, sites: Sequence[str], images: int = 1) -> str:
    """Return the command that measures `sites` at all noise levels of this study, on so many times its images."""
    inputs = [match.matches.inputs for match in own.blocks.values() if match.matches.inputs is not None]
    levels = {noise for own in inputs for noise in own.config.noise}
    levels |= {*USUAL_LEVELS} if len(levels) < 2 else set()
    words = ["difflex concepts STUDY", *(["--site", *sites] if sites else [])]
    words.append(f"--noise {','.join(f'{noise:g}' for noise in sorted(levels))}")
    if inputs:
        usual, _ = Counter(own.settings for own in inputs).most_common(1)[0]
        source, config = usual
        words += ["--folder FOLDER"] if source.startswith("folder ") else []
        words += [f"--images {images * config.images}"] if images * config.images != ConceptsConfig().images else []
        words += [f"--pixels {config.pixels[0]}x{config.pixels[1]}"] if config.pixels else []
        words += ["--empty-prompts"] if config.empty_prompts else []
    return " ".join(words)
