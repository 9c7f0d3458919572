"""The report of a study: one page that needs nothing from outside, and the numbers of every figure as CSV files."""

from difflex.report.facts import Facts, read
from difflex.report.page import SECTIONS, write_report
from difflex.report.sections import Figure, Missing, Section, Table

__all__ = ["SECTIONS", "Facts", "Figure", "Missing", "Section", "Table", "read", "write_report"]
