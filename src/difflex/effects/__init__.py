"""Effects of edits: steering evaluation; inner doors for concept removal, findings and the worlds that edits are judged in."""

from difflex.effects.inputs import ModelFunctions, Provenance
from difflex.effects.judging import StrengthCurve, StrengthPoint
from difflex.effects.steering_evaluation import (
    ImageStrip,
    SteeringConfig,
    SteeringResults,
    run_steering_evaluation,
    steering_table,
)

__all__ = [
    "ImageStrip",
    "ModelFunctions",
    "Provenance",
    "SteeringConfig",
    "SteeringResults",
    "StrengthCurve",
    "StrengthPoint",
    "run_steering_evaluation",
    "steering_table",
]
