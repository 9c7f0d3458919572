"""Match features to known concepts: which concepts in labelled images the features of a dictionary detect."""

from typing import TYPE_CHECKING

from difflex.lazy import lazy_names

if TYPE_CHECKING:
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

__getattr__ = lazy_names(
    __name__,
    {
        "FIRST_SEED": "difflex.evaluation.concepts.sources",
        "Concept": "difflex.evaluation.concepts.results",
        "ConceptsConfig": "difflex.evaluation.concepts.results",
        "LabelFolder": "difflex.evaluation.concepts.sources",
        "drawn_concepts": "difflex.evaluation.concepts.sources",
        "drawn_images": "difflex.evaluation.concepts.sources",
        "drawn_source": "difflex.evaluation.concepts.sources",
        "label": "difflex.evaluation.concepts.labels",
        "match": "difflex.evaluation.concepts.matching",
        "match_studies": "difflex.evaluation.concepts.run",
    },
)
