"""What a dictionary is worth, on tokens it never saw: how well it rebuilds, how sparsely, and what that does to the model."""

from difflex.evaluation.changing import Edits, Measure, effects, some_shots
from difflex.evaluation.measuring import evaluate
from difflex.evaluation.record import Effect, Evaluation, Figures, Quality, Replaced, checksum

__all__ = [
    "Edits",
    "Effect",
    "Evaluation",
    "Figures",
    "Measure",
    "Quality",
    "Replaced",
    "checksum",
    "effects",
    "evaluate",
    "some_shots",
]
