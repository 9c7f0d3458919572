"""The report of a study: one page that needs nothing from outside, and the numbers of every figure as CSV files."""

from difflex.report.facts import StudyFacts, read
from difflex.report.page import SECTIONS, write_report
from difflex.report.sections import FigureTable, MissingFigure, ReportFigure, ReportSection

__all__ = ["SECTIONS", "FigureTable", "MissingFigure", "ReportFigure", "ReportSection", "StudyFacts", "read", "write_report"]
