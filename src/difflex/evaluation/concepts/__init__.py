"""Match features to known concepts: which concepts in labelled images the features of a dictionary detect."""

from difflex.evaluation.concepts.labels import Concept, LabelFolder, LabelledImage, LabelledImages, label, to_image
from difflex.evaluation.concepts.matching import FeatureMethod, match
from difflex.evaluation.concepts.results import ConceptsConfig
from difflex.evaluation.concepts.store import match_studies

__all__ = [
    "Concept",
    "ConceptsConfig",
    "FeatureMethod",
    "LabelFolder",
    "LabelledImage",
    "LabelledImages",
    "label",
    "match",
    "match_studies",
    "to_image",
]
