"""Edits of activations while a picture is made: by the features of a dictionary, or along a direction found by contrast."""

from difflex.steering.contrast import Contrast, Method, Part, contrast, made_of
from difflex.steering.editing import Features, Steering, at_random, check_maker, features_of, steered_along, steerings
from difflex.steering.judging import Curve, Drawn, Judged, Point, Task, Trial, Verdict, judge, side_by_side
from difflex.steering.maps import Maps
from difflex.steering.regions import covered, rectangle
from difflex.steering.scales import Scales, scales_of
from difflex.steering.studied import Draw, Recorded, Toolbox, steer

__all__ = [
    "Contrast",
    "Curve",
    "Draw",
    "Drawn",
    "Features",
    "Judged",
    "Maps",
    "Method",
    "Part",
    "Point",
    "Recorded",
    "Scales",
    "Steering",
    "Task",
    "Toolbox",
    "Trial",
    "Verdict",
    "at_random",
    "check_maker",
    "contrast",
    "covered",
    "features_of",
    "judge",
    "made_of",
    "rectangle",
    "scales_of",
    "side_by_side",
    "steer",
    "steered_along",
    "steerings",
]
