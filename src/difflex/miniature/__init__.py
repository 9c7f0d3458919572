"""The drawn world: scenes whose every concept is known, a judge of images of it, and the model that was trained in it."""

from difflex.miniature.drawing import Scenes, draw
from difflex.miniature.judge import Judge, load_judge
from difflex.miniature.scoring import score

__all__ = ["Judge", "Scenes", "draw", "load_judge", "score"]
