"""The page about two studies."""

from pathlib import Path

from difflex.report.comparison.pairs import StudyComparison
from difflex.report.comparison.sections import SECTIONS
from difflex.report.page import rendered, write

__all__ = ["write_comparison"]


def write_comparison(comparison: StudyComparison, path: Path) -> Path:
    """`path`, now a page about two studies that needs nothing from outside."""
    sections = [section(comparison) for section in SECTIONS]
    return write(path, rendered("comparison.html", sections, names=comparison.names))
