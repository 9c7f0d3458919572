"""What a dictionary is worth, on tokens it never saw: how well it rebuilds, how sparsely, and what that does to the model."""

from difflex.evaluation.changing import effects
from difflex.evaluation.measuring import evaluate
from difflex.evaluation.networks import ClipModel, check_likeness, likeness
from difflex.evaluation.record import Evaluation, ModelEffect, ReconstructionMetrics, ReconstructionQuality, ReplacementEffect
from difflex.evaluation.renewing import EditedModel, HeldOutData, renew

__all__ = [
    "ClipModel",
    "EditedModel",
    "Evaluation",
    "HeldOutData",
    "ModelEffect",
    "ReconstructionMetrics",
    "ReconstructionQuality",
    "ReplacementEffect",
    "check_likeness",
    "effects",
    "evaluate",
    "likeness",
    "renew",
]
