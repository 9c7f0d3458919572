"""Training: dictionaries fitted to a stream of activations, one or many at once, in one or many processes."""

from difflex.training.config import AdamConfig, AuxKLoss, InitConfig, JumpReLUConfig, TrainingConfig
from difflex.training.fitting import FitConfig, fit
from difflex.training.presets import default, paper, unbox
from difflex.training.team import Team
from difflex.training.window import Batches, shuffled

__all__ = [
    "AdamConfig",
    "AuxKLoss",
    "Batches",
    "FitConfig",
    "InitConfig",
    "JumpReLUConfig",
    "Team",
    "TrainingConfig",
    "default",
    "fit",
    "paper",
    "shuffled",
    "unbox",
]
