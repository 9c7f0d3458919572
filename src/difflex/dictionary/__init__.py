"""Sparse dictionaries of activations: encode, decode, directions, save and load, whatever their kind."""

from difflex.dictionary.autoencoder import SAE, SAEWeights
from difflex.dictionary.base import Dictionary, DictionaryOrigin, DictionaryState, NormalisedDictionary
from difflex.dictionary.files import checksum
from difflex.dictionary.foreign_itda import read_itda
from difflex.dictionary.itda import ITDA
from difflex.dictionary.neurons import Neurons
from difflex.dictionary.normalisation import Normalisation, VectorMoments

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
    "checksum",
    "read_itda",
]
