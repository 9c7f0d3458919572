"""The drawn world: scenes whose concepts are known at every pixel, a judge of images of it, and the model trained on it."""

from difflex.miniature.drawing import Scenes, draw
from difflex.miniature.judge import Judge, load_judge
from difflex.miniature.scoring import correct_attributes, score

__all__ = ["Judge", "Scenes", "correct_attributes", "draw", "load_judge", "score"]
