"""The page: sections of facts, laid out by a template, written beside the CSV files of their figures."""

import base64
from collections.abc import Callable, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from difflex.files import write_file
from difflex.report.claims import claims
from difflex.report.drawing import legend, script, style
from difflex.report.facts import StudyFacts, read
from difflex.report.figures.anatomy import anatomy
from difflex.report.figures.concepts import concepts
from difflex.report.figures.explanations import explanations
from difflex.report.figures.findings import findings
from difflex.report.figures.firing import firing
from difflex.report.figures.images import images
from difflex.report.figures.quality import quality
from difflex.report.figures.removal import removal
from difflex.report.figures.steering import steering
from difflex.report.overview import Spell, again, overview, plainly
from difflex.report.sections import ReportFigure, ReportSection
from difflex.report.table import dictionaries
from difflex.study import Study

__all__ = ["SECTIONS", "rendered", "write", "write_report"]

SECTIONS: tuple[Callable[[StudyFacts], ReportSection], ...] = (
    overview,
    claims,
    anatomy,
    firing,
    quality,
    concepts,
    explanations,
    steering,
    removal,
    findings,
    images,
    dictionaries,
)
"""In their order on the page; one more is a function from facts to a Section."""
HERE = Path(__file__).parent


def write_report(study: Study, control: Study | None = None, spell: Spell = plainly) -> list[Path]:
    """The files of the report of `study`: the page, then the numbers of each figure.

    `control` is a study of the same model untrained; `spell` knows how commands are written.
    """
    facts = read(study, control)
    sections = [*(section(facts) for section in SECTIONS), again(facts, spell)]
    figures = [figure for section in sections for figure in section.figures]
    assert len({figure.name for figure in figures}) == len(figures), "two figures of one name would share a file"
    folder = study.folder / "report"
    written = [write(study.folder / "report.html", rendered("page.html", sections, facts=facts))]
    for stale in set(folder.glob("*.csv")) - {folder / f"{figure.name}.csv" for figure in figures}:
        stale.unlink()  # of a figure that the study no longer has
    return [*written, *(write(folder / f"{figure.name}.csv", figure.table.csv) for figure in figures)]


def rendered(template: str, sections: Sequence[ReportSection], **told: object) -> str:
    """The page that `template` makes of `sections`, with all that it needs inside."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    look = style() + Markup((HERE / "page.css").read_text(encoding="utf-8"))
    work = script() + Markup((HERE / "page.js").read_text(encoding="utf-8"))
    return environment.get_template(template).render(
        sections=sections, style=look, script=work, legend=legend, download=_download, **told
    )


def _download(figure: ReportFigure) -> str:
    """The CSV of a figure as an address that holds it."""
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(figure.table.csv.encode()).decode()


def write(path: Path, text: str) -> Path:
    """Write `text` to `path` atomically and return `path`."""
    write_file(path, text.encode())
    return path
