"""Sparse dictionaries of activations: encode, decode, directions, save and load, whatever their kind."""

from difflex.dictionary.autoencoder import Autoencoder, Weights
from difflex.dictionary.base import Dictionary, NormalisedDictionary, Origin, Saved
from difflex.dictionary.files import checksum
from difflex.dictionary.foreign_itda import read_itda
from difflex.dictionary.itda import ITDA
from difflex.dictionary.neurons import Neurons
from difflex.dictionary.normalisation import Moments, Normalisation

__all__ = [
    "ITDA",
    "Autoencoder",
    "Dictionary",
    "Moments",
    "Neurons",
    "Normalisation",
    "NormalisedDictionary",
    "Origin",
    "Saved",
    "Weights",
    "checksum",
    "read_itda",
]
