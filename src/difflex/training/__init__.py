"""Training: dictionaries fitted to a stream of activations, one or many at once, in one or many processes."""

from difflex.training.config import Jump, Optimiser, Revival, Start, Training
from difflex.training.fitting import Course, fit
from difflex.training.presets import default, paper, unbox
from difflex.training.team import Team
from difflex.training.window import Batches, shuffled

__all__ = [
    "Batches",
    "Course",
    "Jump",
    "Optimiser",
    "Revival",
    "Start",
    "Team",
    "Training",
    "default",
    "fit",
    "paper",
    "shuffled",
    "unbox",
]
