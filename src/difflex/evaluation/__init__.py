"""Evaluate dictionaries on held-out tokens: reconstruction, sparsity, and the effect on the model's output.

Records can be read without torch: the names of this door are imported when they are first asked for.
"""

from typing import TYPE_CHECKING

from difflex.lazy import lazy_names

if TYPE_CHECKING:
    from difflex.evaluation.image_similarity import ClipModel
    from difflex.evaluation.reconstruction import Evaluation, ReconstructionQuality, evaluate
    from difflex.evaluation.run import EditedModel, EvaluationConfig, evaluate_study, evaluation_table

__all__ = [
    "ClipModel",
    "EditedModel",
    "Evaluation",
    "EvaluationConfig",
    "ReconstructionQuality",
    "evaluate",
    "evaluate_study",
    "evaluation_table",
]

__getattr__ = lazy_names(
    __name__,
    {
        "ClipModel": "difflex.evaluation.image_similarity",
        "EditedModel": "difflex.evaluation.run",
        "Evaluation": "difflex.evaluation.reconstruction",
        "EvaluationConfig": "difflex.evaluation.run",
        "ReconstructionQuality": "difflex.evaluation.reconstruction",
        "evaluate": "difflex.evaluation.reconstruction",
        "evaluate_study": "difflex.evaluation.run",
        "evaluation_table": "difflex.evaluation.run",
    },
)
