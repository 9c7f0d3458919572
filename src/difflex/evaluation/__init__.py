"""What a dictionary is worth, on tokens it never saw: how well it rebuilds, how sparsely, and what that does to the model."""

from difflex.evaluation.changing import effects
from difflex.evaluation.measuring import evaluate
from difflex.evaluation.networks import Clip, check_likeness, likeness
from difflex.evaluation.record import Effect, Evaluation, Figures, Quality, Replaced
from difflex.evaluation.renewing import HeldOut, Model, renew

__all__ = [
    "Clip",
    "Effect",
    "Evaluation",
    "Figures",
    "HeldOut",
    "Model",
    "Quality",
    "Replaced",
    "check_likeness",
    "effects",
    "evaluate",
    "likeness",
    "renew",
]
