"""Activations on disk: shards and a manifest; append, resume, verify, shuffled batches. Or the same batches live."""

from difflex.store.live import Live
from difflex.store.planning import Harvest, Recording
from difflex.store.recording import record
from difflex.store.statistics import Statistics
from difflex.store.store import Store

__all__ = ["Harvest", "Live", "Recording", "Statistics", "Store", "record"]
