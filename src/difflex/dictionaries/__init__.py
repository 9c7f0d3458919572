"""Sparse dictionaries of activations: encode, decode, directions, save and load, whatever their kind."""

from difflex.dictionaries.base import Dictionary, DictionaryOrigin, DictionaryState, NormalisedDictionary
from difflex.dictionaries.files import fingerprint
from difflex.dictionaries.foreign_itda import read_itda
from difflex.dictionaries.itda import ITDA
from difflex.dictionaries.neurons import Neurons
from difflex.dictionaries.normalisation import Normalisation, VectorMoments
from difflex.dictionaries.sae import SAE, SAEWeights

__all__ = [
    "ITDA",
    "SAE",
    "Dictionary",
    "DictionaryOrigin",
    "DictionaryState",
    "Neurons",
    "Normalisation",
    "NormalisedDictionary",
    "SAEWeights",
    "VectorMoments",
    "fingerprint",
    "read_itda",
]
