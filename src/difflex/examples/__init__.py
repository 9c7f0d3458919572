"""Where each feature fires: the shots at which it does so most, random ones, and those where it is silent; with figures."""

from difflex.examples.collecting import Draw, Source, collect
from difflex.examples.gathering import CollectConfig
from difflex.examples.roll import CollectBatch
from difflex.examples.writing import AtomLocation, CollectTarget

__all__ = ["AtomLocation", "CollectBatch", "CollectConfig", "CollectTarget", "Draw", "Source", "collect"]
