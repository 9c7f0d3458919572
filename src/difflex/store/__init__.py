"""Activations on disk: shards and a manifest; append, resume, verify, shuffled batches. Or the same batches live."""

from difflex.store.live import Live
from difflex.store.planning import Harvest, Recording, recorded_bytes, shots_for
from difflex.store.recording import record
from difflex.store.room import said_size
from difflex.store.shard import Form
from difflex.store.statistics import Statistics
from difflex.store.store import Store

__all__ = ["Form", "Harvest", "Live", "Recording", "Statistics", "Store", "record", "recorded_bytes", "said_size", "shots_for"]
