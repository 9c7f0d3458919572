"""Where each feature fires: the shots at which it does so most, random ones, and those where it is silent; with figures."""

from difflex.examples.collecting import Draw, Source, collect
from difflex.examples.gathering import Collecting
from difflex.examples.roll import Met
from difflex.examples.writing import PatchAt, Subject

__all__ = ["Collecting", "Draw", "Met", "PatchAt", "Source", "Subject", "collect"]
