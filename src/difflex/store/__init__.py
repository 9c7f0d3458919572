"""Activations on disk: shards and a manifest; append, resume, verify, shuffled batches. Or the same batches live."""

from difflex.store.live import LiveActivations
from difflex.store.planning import Harvest, RecordingConfig, recorded_bytes, shots_for
from difflex.store.recording import record
from difflex.store.room import said_size
from difflex.store.shard import ShardFormat
from difflex.store.statistics import StoreStatistics
from difflex.store.store import Store

__all__ = [
    "Harvest",
    "LiveActivations",
    "RecordingConfig",
    "ShardFormat",
    "Store",
    "StoreStatistics",
    "record",
    "recorded_bytes",
    "said_size",
    "shots_for",
]
