"""What removing concepts takes away and what it leaves: the table of SAeUron (arXiv 2501.18052), and a bar for each concept."""

from collections.abc import Sequence
from statistics import fmean

from markupsafe import Markup

from difflex.effects import RemovalResults, RemovedConcept
from difflex.report.drawing import Axis, ChartRow, Drawing, LegendEntry, PlotPoint, RowChart, RowEntry, SeriesStyle, element, rows
from difflex.report.facts import StudyFacts
from difflex.report.sections import FigureTable, MissingFigure, ReportFigure, ReportSection
from difflex.report.telling import apart, count, percent

__all__ = ["BAR", "removal", "together"]

BAR = 0.9
"""Of removal and of retention, from which on a concept counts as removed."""
UA = LegendEntry("ua", "removed (UA)", SeriesStyle(colour=0, marker="square"), line=False)
IRA = LegendEntry("ira", "others of the group kept (IRA)", SeriesStyle(colour=1, marker="diamond"), line=False)
CRA = LegendEntry("cra", "all else kept (CRA)", SeriesStyle(colour=5, marker="ring"), line=False)


def removal(facts: StudyFacts) -> ReportSection:
    """The section about removing concepts."""
    there = facts.removals
    steps = apart({together(each): _steps(each) for each in there}) or "at every step"
    return ReportSection(
        name="removal",
        title="Concepts taken away",
        lead=f"The features of a concept are chosen by SAeUron's score on one set of prompts and taken away {steps}; judged is "
        "on prompts that nothing was chosen by. UA: images that no longer show the concept their prompts name. IRA: "
        "images that still show another concept of its group. CRA: all else that prompts state and that still is so; of its "
        "own: the same in images of the concept alone.",
        body=_table(there) if there else Markup(""),
        figures=(_figure(there),) if there else (),
        missing=() if there else (MissingFigure("What comes of taking concepts away", "difflex removal STUDY"),),
    )


def _steps(removed: RemovalResults) -> str:
    first, _, end = str(removed.made_from.get("steps", "all")).partition(":")
    return f"at steps {first} to {int(end) - 1}" if end else "at every step"


def together(removed: RemovalResults) -> str:
    """The dictionaries that were edited at once."""
    return " + ".join(removed.dictionaries)


def _groups(removed: RemovalResults) -> dict[str, list[RemovedConcept]]:
    names = dict.fromkeys(each.group for each in removed.concepts)
    return {name: [each for each in removed.concepts if each.group == name] for name in names}


def _table(there: Sequence[RemovalResults]) -> Markup:
    names = ("dictionaries", "group", "UA", "IRA", "CRA", "CRA of its own", "all three at least 90 %", "features", "strength")
    head = element("tr", *(element("th", name, scope="col", class_="word" if i < 2 else None) for i, name in enumerate(names)))
    body = []
    for removed in there:
        for group, of in _groups(removed).items():
            shares = [percent(fmean(getattr(each.rates, rate) for each in of)) for rate in ("ua", "ira", "cra", "own")]
            reach = f"{sum(each.rates.reach(BAR) for each in of)} of {len(of)}"
            features = f"{min(each.each for each in of)} to {max(each.each for each in of)}"
            strengths = f"{max(each.strength for each in of):g} to {min(each.strength for each in of):g}"
            cells = [element("td", value) for value in (*shares, reach, features, strengths)]
            first = element("th", together(removed), scope="row")
            body.append(element("tr", first, element("td", group, class_="word"), *cells))
    table = element("table", element("thead", head), element("tbody", *body))
    return element("div", table, class_="box", tabindex="0", role="region", aria_label="Concepts taken away")


def _figure(there: Sequence[RemovalResults]) -> ReportFigure:
    table = tuple(
        (together(removed), each.group, each.concept, each.images, each.shown, *each.rates, each.each, each.strength)
        for removed in there
        for each in removed.concepts
    )
    columns = (
        "dictionaries",
        "group",
        "concept",
        "images",
        "shown unedited",
        "UA",
        "IRA",
        "CRA",
        "CRA of its own",
        "features",
        "strength",
    )
    return ReportFigure(
        name="removal",
        title="What goes, and what stays, concept by concept",
        caption="The bar is the share of images from which the concept is gone; the points say what is left of the others of "
        "its group and of all else. A concept counts as removed where all three are at least 90 %.",
        formula="UA = gone / shown before; IRA, CRA = still so / so before; on unseen prompts",
        table=FigureTable(columns, table),
        drawings=tuple(_drawing(removed, group, of) for removed in there for group, of in _groups(removed).items()),
        keys=(UA, IRA, CRA),
    )


def _drawing(removed: RemovalResults, group: str, of: Sequence[RemovedConcept]) -> Drawing:
    axis = Axis(label="share", low=0.0, high=1.0, percent=True)
    about = f"{count(len(of), 'concept')}: a bar for removal, and two points for what is kept."
    title = f"{group}: {together(removed)}"
    return rows(RowChart(title=title, description=about, x=axis, rows=tuple(map(_row, of))))


def _row(each: RemovedConcept) -> ChartRow:
    shares = ((UA, each.rates.ua), (IRA, each.rates.ira), (CRA, each.rates.cra))
    entries = tuple(
        RowEntry(
            series=key.series,
            look=key.look,
            mark=PlotPoint(x=share, y=0, tip=f"{each.concept}\n{key.name}: {percent(share)}"),
            bar=key is UA,
        )
        for key, share in shares
    )
    return ChartRow(name=each.concept, note="✓" if each.rates.reach(BAR) else percent(each.rates.ua), entries=entries)
