"""The page of a report: its sections in order, laid out by a template, and the sections about the study and its commands."""

import base64
import re
import shlex
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from difflex.errors import DifflexError
from difflex.files import write_file
from difflex.report.claims import claims
from difflex.report.drawing import Drawing, element
from difflex.report.drawing.charts import legend
from difflex.report.facts import StudyFacts, group_by
from difflex.report.figures import ReportFigure, ReportSection
from difflex.report.figures.anatomy import anatomy
from difflex.report.figures.concepts import concepts
from difflex.report.figures.editing import editing
from difflex.report.figures.effects import findings, removal
from difflex.report.figures.explanations import explanations
from difflex.report.figures.gallery import gallery, wall
from difflex.report.figures.measures import block_roles, measures
from difflex.report.figures.paper import paper_figures
from difflex.report.figures.quality import quality
from difflex.report.figures.steering import steering, strip
from difflex.report.figures.summary import summary
from difflex.report.figures.transfer import transfer
from difflex.report.reading import read_facts
from difflex.report.style import count
from difflex.study import CommandRecord, Study

Spell = Callable[[CommandRecord], Sequence[str]]
"""From a record of the log to the words of its command line."""
HERE = Path(__file__).parent
MARGIN = 14.0
"""Around a drawing in a file of its own."""


def write_report(study: Study, control: Study | None = None, spell: Spell | None = None) -> list[Path]:
    """Write the report of `study` and return its files: the page, the numbers of each figure, and some drawings.

    `control` is a study of the same model untrained; `spell` returns the words of a command.
    """
    facts = read_facts(study, control)
    sections = [section(facts) for section in SECTIONS]
    sections.append(paper_figures(facts, {figure.name: figure for section in sections for figure in section.figures}))
    sections.append(_study(facts, spell or _plain_words))
    page = study.folder / "report.html"
    write_file(page, render("page.html", sections, facts=facts, summary=summary(facts)).encode())
    figures = [figure for section in sections for figure in section.figures]
    folder = study.folder / "report"
    files = {folder / f"{figure.name}.csv": figure.csv for figure in figures}
    assert len(files) == len(figures), "two figures of one name would share a file"
    for figure in figures:
        files |= {folder / f"{name}.svg": _svg_file(drawing) for name, drawing in figure.files.items()}
    for stale in {*folder.glob("*.csv"), *folder.glob("*.svg")} - files.keys():
        stale.unlink()  # of a figure that the study no longer has
    for path, text in files.items():
        write_file(path, text.encode())
    return [page, *files]


def render(template: str, sections: Sequence[ReportSection], **values: object) -> str:
    """Return the page that `template` makes of `sections`, with style sheets, scripts and data inside."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style, script = (
        Markup().join(Markup((HERE / name).read_text(encoding="utf-8")) for name in (f"drawing/drawing.{kind}", f"page.{kind}"))
        for kind in ("css", "js")
    )
    shown = [section for section in sections if section.is_shown]
    missing = group_by((gap for section in sections for gap in section.missing), lambda gap: gap.command)
    return environment.get_template(template).render(
        sections=shown, missing=missing, style=style, script=script, legend=legend, download=_download, **values
    )


def _svg_file(drawing: Drawing) -> str:
    """Return a drawing as a file of its own, on paper with margins, in light or dark as the reader prefers."""
    box = re.search(r'viewBox="0 0 (\S+) (\S+)"', drawing.svg)
    assert box, "every drawing has a box"
    width, height = (float(side) + 2 * MARGIN for side in box.groups())
    size = f'width="{width:g}" height="{height:g}" style="width: {width:g}px; height: {height:g}px; max-width: none"'
    place = f'xmlns="http://www.w3.org/2000/svg" viewBox="{-MARGIN:g} {-MARGIN:g} {width:g} {height:g}" {size}'
    head, _, inside = str(drawing.svg).replace(box.group(), place, 1).partition(">")
    style = (HERE / "drawing/drawing.css").read_text(encoding="utf-8")
    paper = element("rect", x=-MARGIN, y=-MARGIN, width=width, height=height, class_="paper")
    return f"{head}><style>{style}</style>{paper}{inside}"


def problem_list(title: str, problems: Sequence[str]) -> Markup:
    """Return a box that lists problems; nothing without problems."""
    items = [element("li", problem) for problem in problems]
    return element("aside", element("h3", title), element("ul", *items), class_="problems") if items else Markup()


def _download(figure: ReportFigure) -> str:
    """Return the CSV of a figure as a data URL."""
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(figure.csv.encode()).decode()


def _study(facts: StudyFacts, spell: Spell) -> ReportSection:
    """Return the section about the study itself: its files and its commands."""
    seconds = sum(entry.seconds or 0 for entry in facts.log)
    values = {
        "Model": facts.study.model,
        "Revision": facts.study.revision or "not set",
        "Study": facts.study.folder.resolve().name,
        "Started": f"{_date(facts.started)}, with difflex {facts.study.difflex}",
        "Latest file": _date(facts.latest),
        **({"Time of its commands": _duration(seconds)} if seconds else {}),
    }
    entries = [element("div", element("dt", name), element("dd", value)) for name, value in values.items()]
    body = element("dl", *entries, class_="summary") + problem_list("Left out of this report", facts.problems)
    return ReportSection(name="study", title="The study and its commands", body=body + _commands(facts, spell))


def _commands(facts: StudyFacts, spell: Spell) -> Markup:
    if facts.log:
        line = ["difflex", *(spell(facts.recipe) if facts.recipe else ("run", "RECIPE")), "--out", "STUDY"]
        lead = "One command runs the recipe again: it skips finished commands and repeats stale ones."
        items = [_command(entry, spell) for entry in facts.log if entry.verb != "report"]
        head = element("summary", f"Its {count(len(items), 'command')}, with their times")
        commands = element("details", head, element("ol", *items, class_="commands"))
    else:
        line, commands = ["difflex", "report", "STUDY"], Markup()
        lead = (
            "This study has no log, as its commands were not run by a recipe. The settings of each dictionary are in its "
            "config.json."
        )
    return element("p", lead) + element("pre", element("code", shlex.join(line))) + commands


def _command(entry: CommandRecord, spell: Spell) -> Markup:
    try:
        words = spell(entry)
    except DifflexError:  # a command that this version does not have
        words = _plain_words(entry)
    return element("li", element("code", f"difflex {shlex.join(words)}"), " ", element("span", _state(entry)))


def _plain_words(entry: CommandRecord) -> list[str]:
    """Return the verb and the values of an entry by name, where its flags are not known."""
    return [entry.verb, *(setting for setting in entry.settings if "SHA-256" not in setting.partition("=")[0])]


def _state(entry: CommandRecord) -> str:
    """Return when a command was finished and how long it took."""
    if entry.seconds is None:
        return "started, not finished"
    when = f" {_date(datetime.fromisoformat(entry.finished).astimezone(UTC))}," if entry.finished else ""
    seconds, duration = count(round(entry.seconds), "second"), _duration(entry.seconds)
    return f"finished{when} in {seconds}{'' if seconds == duration else f' ({duration})'}"


def _date(when: datetime | None) -> str:
    return "unknown" if when is None else f"{when:%-d %B %Y, %H:%M} UTC"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if seconds < 120:
        return count(round(seconds), "second")
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"


SECTIONS: tuple[Callable[[StudyFacts], ReportSection], ...] = (
    wall,
    strip,
    quality,
    transfer,
    concepts,
    anatomy,
    explanations,
    gallery,
    measures,
    block_roles,
    steering,
    removal,
    editing,
    findings,
    claims,
)
"""The sections in their order on the page; the figures of the paper and the study itself follow."""
