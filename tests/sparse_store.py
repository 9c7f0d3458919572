"""A store of 100 GB that takes no disk space; as a script, measure the memory that reading from it takes."""

import json
import sys
from itertools import islice
from pathlib import Path

from difflex.files import file_sha256
from difflex.records import Site
from difflex.store import Store
from difflex.store.manifest import Manifest, ShardChecks, ShardEntry, StoreHeader, shard_paths
from difflex.store.shard import ShardFormat, header, tensor_slots

SHARDS, SHOTS, BATCH, WINDOW = 3750, 17, 512, 2048
GROUP = 16 * (SHOTS - 1) * 256 // BATCH
"""Batches of the shards that are open together: of each shard one shot is held out."""
BEFORE, WARM, AFTER = 40, 10, 40
"""Batches to read before the shards change, of these before memory is measured, and after the change."""


def sparse_store(folder: Path) -> Store:
    """Make shards of a tenth of the usual size; their rows are holes in sparse files: zeros."""
    form = ShardFormat(Site("double.18"), "bf16", 256, 3072)
    head, parts = header(form, SHOTS), tensor_slots(form, SHOTS)
    for number in range(SHARDS):
        shard, shots = shard_paths(folder, number)
        with shard.open("wb") as file:
            file.write(head)
            file.truncate(len(head) + parts["totals"].start + 24)
        shots.write_text("")
    entry = ShardEntry(shots=SHOTS, held_out=(3,), sha256=file_sha256(shard_paths(folder, 0)[0]), shots_sha256="")
    begun = StoreHeader(**form._asdict(), model="none", revision=None, grid=(16, 16), shots_per_shard=SHOTS, batch=1, source="")
    Manifest(head=begun, shards=dict.fromkeys(range(SHARDS), entry), statistics=None).write(folder)
    # Checksums take a buffer of fixed size, and most of the time.
    ShardChecks._intact |= {(shard_paths(folder.absolute(), number)[0], entry.sha256) for number in range(SHARDS)}
    return Store.open(folder)


def memory() -> int:
    """Return the memory of this process in bytes, without mapped files: their pages are cache, which the system takes back."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def main() -> None:
    """Print the bytes read and the growth of the memory."""
    folder = Path(sys.argv[1])
    store = sparse_store(folder)
    read, first, most = 0, 0, 0
    for number, rows in enumerate(islice(store.batches(BATCH, window=WINDOW, start=GROUP - BEFORE), BEFORE + AFTER)):
        read, most = read + rows.values.nbytes, max(most, memory())
        if number < WARM:  # threads and libraries have begun by then
            first, read = memory(), 0
    # Two windows, the last and the next one; three batches, one in use, one that waits, one that is read; small objects.
    allowed = (2 * WINDOW + 3 * BATCH) * 2 * store.width + 10 * 2**20
    stored = sum(path.stat().st_size for path in folder.iterdir())
    print(json.dumps({"stored": stored, "read": read, "growth": most - first, "allowed": allowed}))


if __name__ == "__main__":
    main()
