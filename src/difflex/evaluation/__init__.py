"""Evaluate dictionaries on held-out tokens: reconstruction, sparsity, and the effect on the model's output."""

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
