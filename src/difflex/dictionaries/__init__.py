"""Sparse dictionaries of activations: encode, decode, directions, save and load, for every kind of dictionary."""

from difflex.dictionaries.base import Dictionary, DictionaryOrigin, Neurons, NormalisedDictionary
from difflex.dictionaries.code_statistics import CodeStatistics
from difflex.dictionaries.itda import ITDA
from difflex.dictionaries.normalisation import Normalisation
from difflex.dictionaries.sae import SAE, SAEWeights
from difflex.dictionary_config import fingerprint

__all__ = [
    "ITDA",
    "SAE",
    "CodeStatistics",
    "Dictionary",
    "DictionaryOrigin",
    "Neurons",
    "Normalisation",
    "NormalisedDictionary",
    "SAEWeights",
    "fingerprint",
]
