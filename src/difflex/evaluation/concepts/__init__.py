"""Known concepts: what the features of a dictionary have to do with what images are known to show."""

from difflex.evaluation.concepts.folder import LabelFolder
from difflex.evaluation.concepts.keeping import StoredMatches, keep
from difflex.evaluation.concepts.labelled import (
    Concept,
    LabelledActivations,
    LabelledImage,
    LabelThresholds,
    label,
    on_grid,
    painted,
)
from difflex.evaluation.concepts.matches import (
    ConceptDetector,
    ConceptMatches,
    ConceptResult,
    ConfidenceInterval,
    FeatureMatches,
    NoiseLevelResult,
    covered,
)
from difflex.evaluation.concepts.matching import MatchingConfig, match
from difflex.evaluation.concepts.methods import FeatureMethod, principal_axes, random_directions
from difflex.evaluation.concepts.tables import table

__all__ = [
    "Concept",
    "ConceptDetector",
    "ConceptMatches",
    "ConceptResult",
    "ConfidenceInterval",
    "FeatureMatches",
    "FeatureMethod",
    "LabelFolder",
    "LabelThresholds",
    "LabelledActivations",
    "LabelledImage",
    "MatchingConfig",
    "NoiseLevelResult",
    "StoredMatches",
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
