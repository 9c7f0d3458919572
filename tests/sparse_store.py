"""A store of 100 GB that takes no disk space; as a script, measure the memory that reading from it takes."""

import json
import resource
import sys
from pathlib import Path

from difflex.records import Site
from difflex.store import Store
from difflex.store.manifest import Manifest, ShardEntry, StoreHeader, shard_paths
from difflex.store.shard import ShardFormat, header, tensor_slots

SHARDS, SHOTS, BATCH, WINDOW = 375, 170, 1024, 4096
READ = 400 * 2**20


def sparse_store(folder: Path) -> Store:
    """Make shards of the usual size whose rows are holes in sparse files: zeros."""
    form = ShardFormat(Site("double.18"), "bf16", 256, 3072)
    head, parts = header(form, SHOTS), tensor_slots(form, SHOTS)
    for number in range(SHARDS):
        shard, shots = shard_paths(folder, number)
        with shard.open("wb") as file:
            file.write(head)
            file.truncate(len(head) + parts["totals"].start + 24)
        shots.write_text("")
    entry = ShardEntry(shots=SHOTS, held_out=(3,), sha256="", shots_sha256="")
    begun = StoreHeader(**form._asdict(), model="none", revision=None, grid=(16, 16), shots_per_shard=SHOTS, batch=1, source="")
    Manifest(head=begun, shards=dict.fromkeys(range(SHARDS), entry), statistics=None).write(folder, 0)
    return Store.open(folder)


def memory() -> int:
    """Return the memory of this process with its mapped files, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    """Print the bytes read and the growth of the memory."""
    folder = Path(sys.argv[1])
    store = sparse_store(folder)
    before, read, most = memory(), 0, 0
    for rows in store.batches(BATCH, window=WINDOW):
        read, most = read + rows.values.nbytes, max(most, memory())
        if read > READ:
            break
    # Two windows, the last and the next one; two batches, one filled and one read; small objects.
    allowed = (2 * WINDOW + 2 * BATCH) * 2 * store.width + 30 * 2**20
    stored = sum(path.stat().st_size for path in folder.iterdir())
    print(json.dumps({"stored": stored, "read": read, "growth": most - before, "allowed": allowed}))


if __name__ == "__main__":
    main()
