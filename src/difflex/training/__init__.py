"""Train SAEs on a stream of activations, one or many at once, in one or many processes."""

from difflex.training.config import AdamConfig, AuxKLoss, InitConfig, TrainingConfig, default, paper, unbox
from difflex.training.fitting import FitConfig
from difflex.training.groups import fit

__all__ = ["AdamConfig", "AuxKLoss", "FitConfig", "InitConfig", "TrainingConfig", "default", "fit", "paper", "unbox"]
