"""Where each feature fires: the shots at which it does so most, random ones, and those where it is silent; with figures."""

from difflex.features.collecting import Draw, Source, collect
from difflex.features.gathering import CollectConfig
from difflex.features.roll import CollectBatch
from difflex.features.writing import AtomLocation, CollectTarget

__all__ = ["AtomLocation", "CollectBatch", "CollectConfig", "CollectTarget", "Draw", "Source", "collect"]
