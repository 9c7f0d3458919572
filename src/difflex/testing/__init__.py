"""Public fakes: tiny random pipelines of every family, and a seeing model that answers by rule over HTTP."""

from difflex.testing.pipelines import TINY, tiny_folder, tiny_pipeline
from difflex.testing.seeing import MOODS, RuleServer, Served, by_colour

__all__ = ["MOODS", "TINY", "RuleServer", "Served", "by_colour", "tiny_folder", "tiny_pipeline"]
