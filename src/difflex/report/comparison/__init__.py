"""Two studies side by side: what was asked of them, what they hold, and how the figures of both differ."""

from difflex.report.comparison.page import write_comparison
from difflex.report.comparison.pairs import StudyComparison, compare
from difflex.report.comparison.words import in_words

__all__ = ["StudyComparison", "compare", "in_words", "write_comparison"]
