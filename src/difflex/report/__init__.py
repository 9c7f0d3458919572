"""The report of a study: one page that is complete in itself, the numbers of every figure as CSV files, and drawings as SVG."""

from difflex.report.facts import StudyFacts
from difflex.report.page import write_report
from difflex.report.reading import read_facts

__all__ = ["StudyFacts", "read_facts", "write_report"]
