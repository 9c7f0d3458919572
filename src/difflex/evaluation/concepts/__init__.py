"""Match features to known concepts: which concepts in labelled images the features of a dictionary detect."""

from difflex.evaluation.concepts.labels import label
from difflex.evaluation.concepts.matching import match
from difflex.evaluation.concepts.results import Concept, ConceptsConfig
from difflex.evaluation.concepts.run import match_studies
from difflex.evaluation.concepts.sources import FIRST_SEED, LabelFolder, drawn_concepts, drawn_images, drawn_source

__all__ = [
    "FIRST_SEED",
    "Concept",
    "ConceptsConfig",
    "LabelFolder",
    "drawn_concepts",
    "drawn_images",
    "drawn_source",
    "label",
    "match",
    "match_studies",
]
