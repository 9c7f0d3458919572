"""Edits of activations while an image is generated: by features of a dictionary, or along a contrast direction."""

from difflex.steering.contrast import Contrast, FeatureContribution, Inside, Method, contrast, contrasts, everywhere, made_of
from difflex.steering.editing import (
    EditFeatures,
    SteeringHook,
    at_random,
    check_maker,
    features_of,
    steered_along,
    steerings,
)
from difflex.steering.maps import TransplantMaps
from difflex.steering.regions import covered, rectangle
from difflex.steering.scales import FeatureScales, scales_of
from difflex.steering.studied import Draw, EditRecord, StudyEditor, steer

__all__ = ["Contrast"]
