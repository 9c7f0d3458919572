"""Activations on disk: record, resume, verify, read in shuffled batches. Or the same batches from a running harvest."""

from difflex.store.live import LiveActivations
from difflex.store.manifest import StoreStatistics
from difflex.store.reading import require_split
from difflex.store.recorder import format_size
from difflex.store.recording import RecordingConfig, record, recorded_bytes, shots_for
from difflex.store.shard import ShardFormat
from difflex.store.store import Store

__all__ = [
    "LiveActivations",
    "RecordingConfig",
    "ShardFormat",
    "Store",
    "StoreStatistics",
    "format_size",
    "record",
    "recorded_bytes",
    "require_split",
    "shots_for",
]
