"""The anatomy of a model: how large its streams are at each site and timestep, and along which directions they are large."""

from difflex.anatomy.figures import heat_map, spectra
from difflex.anatomy.measuring import ActivationShape, Anatomy, measure

__all__ = ["ActivationShape", "Anatomy", "heat_map", "measure", "spectra"]
