"""Edits of activations while a picture is made: by the features of a dictionary, or along a direction found by contrast."""

from difflex.steering.contrast import Contrast, Inside, Method, Part, contrast, contrasts, everywhere, made_of
from difflex.steering.editing import Features, Steering, at_random, check_maker, features_of, steered_along, steerings
from difflex.steering.judging import Curve, Drawn, Judged, Point, Strip, Task, Trial, Verdict, judge, side_by_side
from difflex.steering.maps import Maps
from difflex.steering.regions import covered, rectangle
from difflex.steering.removal import Cut, Firings, Pictured, Rates, Removal, Removed, Tried, best_of, choose, importance, rates
from difflex.steering.scales import Scales, scales_of
from difflex.steering.sought import Answered, Asked, Likeness, Sought, by_answers
from difflex.steering.studied import Draw, Recorded, Toolbox, steer

__all__ = [
    "Answered",
    "Asked",
    "Contrast",
    "Curve",
    "Cut",
    "Draw",
    "Drawn",
    "Features",
    "Firings",
    "Inside",
    "Judged",
    "Likeness",
    "Maps",
    "Method",
    "Part",
    "Pictured",
    "Point",
    "Rates",
    "Recorded",
    "Removal",
    "Removed",
    "Scales",
    "Sought",
    "Steering",
    "Strip",
    "Task",
    "Toolbox",
    "Trial",
    "Tried",
    "Verdict",
    "at_random",
    "best_of",
    "by_answers",
    "check_maker",
    "choose",
    "contrast",
    "contrasts",
    "covered",
    "everywhere",
    "features_of",
    "importance",
    "judge",
    "made_of",
    "rates",
    "rectangle",
    "scales_of",
    "side_by_side",
    "steer",
    "steered_along",
    "steerings",
]
