"""Known concepts: what the features of a dictionary have to do with what pictures are known to show."""

from difflex.concepts.folder import LabelFolder
from difflex.concepts.keeping import Kept, keep
from difflex.concepts.labelled import Concept, Labelled, Marking, Pictured, label, on_grid, painted
from difflex.concepts.matches import Detector, Features, Finding, Interval, Level, Matches, covered
from difflex.concepts.matching import Matching, match
from difflex.concepts.methods import Method, principal_axes, random_directions
from difflex.concepts.tables import table

__all__ = [
    "Concept",
    "Detector",
    "Features",
    "Finding",
    "Interval",
    "Kept",
    "LabelFolder",
    "Labelled",
    "Level",
    "Marking",
    "Matches",
    "Matching",
    "Method",
    "Pictured",
    "covered",
    "keep",
    "label",
    "match",
    "on_grid",
    "painted",
    "principal_axes",
    "random_directions",
    "table",
]
