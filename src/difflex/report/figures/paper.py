"""The figures of arXiv 2505.24360: which of them this study repeats, and the commands that make what is missing."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from difflex.records import Site
from difflex.report.drawing import element
from difflex.report.facts import DictionaryFacts, StudyFacts, group_by, similar_size
from difflex.report.figures import MissingFigure, ReportFigure, ReportSection
from difflex.report.figures.dictionaries import normalisation_variants, without_normalisation
from difflex.report.figures.quality import one_size, usually_normalised
from difflex.report.style import SAE_KINDS, kind_of, listed

Figures = Mapping[str, ReportFigure]
"""The figures of the report by name."""
SIGNS = {"complete": "✓", "in part": "◐", "missing": "○"}
INTERPRETED = {"SAE": SAE_KINDS, "ITDA": ("itda",), "neurons": ("neurons",)}
"""The kinds of dictionaries in figure 7."""
MADE_BY = {"SAE": "difflex train STUDY", "ITDA": "difflex itda STUDY", "neurons": "difflex neurons STUDY --site SITE:neurons"}


class PaperFigure(NamedTuple):
    """A figure of the paper."""

    number: str
    shows: str
    names: tuple[str, ...]
    """The figures of the report that repeat it; one is enough."""
    missing: Callable[[StudyFacts, Figures], list[MissingFigure]]
    """Returns what the study lacks of it."""

    @property
    def name(self) -> str:
        """As in `Figure 3` or `Appendix B`."""
        return f"Appendix {self.number}" if self.number.isalpha() else f"Figure {self.number}"


def paper_figures(facts: StudyFacts, figures: Figures) -> ReportSection:
    """Return the section that lists the figures of the paper with their state, given all other figures of the report."""
    rows, items, gaps = [], [], []
    for figure in PAPER_FIGURES:
        names, missing = [name for name in figure.names if name in figures], figure.missing(facts, figures)
        state = "missing" if not names else "in part" if missing else "complete"
        rows += [(figure.number, figure.shows, state, " ".join(names), *gap) for gap in missing or [("", "")]]
        items += [_item(figure, state, [figures[name] for name in names], missing)] if names else []
        gaps += [MissingFigure(f"{figure.name} of arXiv 2505.24360: {gap.name}", gap.command) for gap in missing]
    file = ReportFigure(
        name="paper",
        caption="The figures of the paper with their state.",
        columns=("figure", "shows", "state", "here", "lacks", "command"),
        rows=rows,
    )
    return ReportSection(
        name="paper",
        title="Figures of the paper",
        lead="The figures of arXiv 2505.24360 about FLUX.1 that are repeated with the data of this study.",
        body=element("ul", *items, class_="stations") if items else Markup(),
        parts=[file, *gaps],
    )


def _item(figure: PaperFigure, state: str, here: Sequence[ReportFigure], missing: Sequence[MissingFigure]) -> Markup:
    links = [(" · ", element("a", own.title or own.name, href=f"#figure-{own.name}")) for own in here]
    gaps = f" It lacks {listed([gap.name for gap in missing])}." if missing else ""
    text = [element("b", figure.name), f" {figure.shows} ({state})", *(part for link in links for part in link), gaps]
    sign = element("span", SIGNS[state], aria_hidden="true", class_="sign")
    return element("li", sign, element("span", *text), class_="done" if state == "complete" else "open")


def _norms(facts: StudyFacts, _: Figures) -> list[MissingFigure]:
    norms = [by for site, by in facts.anatomy.norms.items() if site.kind == "residual"] if facts.anatomy else []
    if len(norms) > 1 and len({timestep for by in norms for timestep in by}) > 1:
        return []
    return [MissingFigure("norms of several layers at several timesteps", _anatomy_command(facts))]


def _spectra(facts: StudyFacts, _: Figures) -> list[MissingFigure]:
    measured = facts.anatomy
    if measured and measured.shapes and len({t for by in measured.norms.values() for t in by}) > 1:
        return []
    return [MissingFigure("spectra over several timesteps", _anatomy_command(facts))]


def _anatomy_command(facts: StudyFacts) -> str:
    return f"difflex anatomy {facts.study.model} --prompts FILE --steps 4 --out STUDY"


def _dead(facts: StudyFacts, _: Figures) -> list[MissingFigure]:
    groups = [{d.normalisation for d in group} for group in normalisation_variants(facts.evaluated)]
    if any("none" in group and group & {"standardise", "whiten"} for group in groups):
        return []
    gap = "an SAE without normalisation, of the shape, preset and data of one with it"
    return [MissingFigure(gap, without_normalisation(facts))]


def _sweep(facts: StudyFacts, _: Figures) -> list[MissingFigure]:
    usual = usually_normalised(facts.evaluated)
    if not any(d.kind in SAE_KINDS for d in usual):
        return [MissingFigure("evaluated SAEs of several sizes and k", "difflex train STUDY --size 2048,4096 --k 16,32")]
    site, members = max(group_by(usual, lambda d: d.ref.site).items(), key=lambda item: len(item[1]))
    saes, itdas = [d for d in members if d.kind in SAE_KINDS], [d for d in members if d.kind == "itda"]
    gaps = []
    if len({(d.size, d.k) for d in saes}) < 2:
        gaps.append(MissingFigure("SAEs of several sizes or k", f"difflex train STUDY --site {site} --size 2048,4096 --k 16,32"))
    lacking = sorted({sae.size for sae in saes if not any(similar_size(d.size, sae.size) for d in itdas)})
    return [*gaps, *_itda_gaps([site], max(d.k for d in saes), lacking)] if saes else gaps


def _sites(facts: StudyFacts, _: Figures) -> list[MissingFigure]:
    usual = usually_normalised(facts.evaluated)
    sites = list(dict.fromkeys(d.ref.site for d in usual if d.kind != "neurons"))
    if len(sites) < 2:
        return [
            MissingFigure(
                "dictionaries at several sites", "difflex train STUDY --site SITE... and difflex itda STUDY --site SITE..."
            )
        ]
    members = one_size(usual)
    shape = next((d for d in members if d.kind in SAE_KINDS), members[0])  # an ITDA stops where its data end
    k, size = shape.k, shape.size
    without_sae = [site for site in sites if not _has(members, site, SAE_KINDS)]
    without_itda = [site for site in sites if not _has(members, site, ("itda",))]
    names = " ".join(map(str, without_sae))
    gaps = [MissingFigure(f"SAEs at {names}", f"difflex train STUDY --site {names} --k {k} --size {size}")] if without_sae else []
    return [*gaps, *(_itda_gaps(without_itda, k, [size]) if without_itda else [])]


def _has(members: Sequence[DictionaryFacts], site: Site, kinds: Collection[str]) -> bool:
    return any(d.ref.site == site and d.kind in kinds for d in members)


def _itda_gaps(sites: Sequence[Site], k: int, sizes: Sequence[int]) -> list[MissingFigure]:
    if not sizes:
        return []
    names, numbers = " ".join(map(str, sites)), ",".join(map(str, sizes))
    command = f"difflex itda STUDY --site {names} --k {k} --size {numbers}"
    return [MissingFigure(f"ITDA dictionaries of the sizes of the SAEs ({numbers}) at {names}", command)]


def _interpreted(facts: StudyFacts, figures: Figures) -> list[MissingFigure]:
    """Return what lacks explanations or, if more kinds have been compared with known concepts, such a comparison."""
    rows = figures["explained"].rows if "explained" in figures else ()
    explained = {kind_of(str(row[2])) for row in rows}
    ways = {
        "difflex collect STUDY, then difflex explain STUDY --vlm NAME": explained,
        "difflex concepts STUDY": {match.kind for match in facts.matches if not match.untrained},
    }
    lacking = {way: [name for name, kinds in INTERPRETED.items() if not own.intersection(kinds)] for way, own in ways.items()}
    way = min(lacking, key=lambda way: len(lacking[way]))
    kinds = {d.kind for d in facts.dictionaries}
    made = [MADE_BY[name] for name in lacking[way] if not kinds.intersection(INTERPRETED[name])]
    gap = MissingFigure(f"explanations of {', '.join(lacking[way])}", ", then ".join([*made, way]))
    return [gap] if lacking[way] else []


def _images(facts: StudyFacts, _: Figures) -> list[MissingFigure]:
    kinds = {kind_of(ref.label) for ref in facts.books}
    return [] if kinds & {*SAE_KINDS, "itda"} else [MissingFigure("images of the features", "difflex collect STUDY")]


PAPER_FIGURES = (
    PaperFigure("3", "norms by layer and timestep", ("norms",), _norms),
    PaperFigure("4", "spectra of the activations", ("spectra",), _spectra),
    PaperFigure("5", "dead features with and without normalisation", ("dead",), _dead),
    PaperFigure("6", "reconstruction by SAEs and ITDA over k and size", ("sweep",), _sweep),
    PaperFigure("7", "how well features of SAEs, of ITDA and neurons are explained", ("explained", "features"), _interpreted),
    PaperFigure("8", "reconstruction by SAEs and ITDA over sites", ("sites",), _sites),
    PaperFigure("B", "features in the images where they are strongest", ("images",), _images),
)
