"""Edits of activations while an image is generated: of features of a dictionary, or along a contrast direction."""

from difflex.steering.editor import EditRecord, StudyEditor, steer
from difflex.steering.features import EditFeatures, check_origin, dictionary_features, random_features
from difflex.steering.hooks import SteeringHook, rectangle, steering_hooks

__all__ = [
    "EditFeatures",
    "EditRecord",
    "SteeringHook",
    "StudyEditor",
    "check_origin",
    "dictionary_features",
    "random_features",
    "rectangle",
    "steer",
    "steering_hooks",
]
