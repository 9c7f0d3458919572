"""Explain 1,000 features with a VLM server that answers by rule, in a process of its own, over 16 connections.

Every call takes a fixed latency; the rest of the time is our own: planning, drawing images, requests, checks, writing.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import torch

from difflex.explanation import open_client
from difflex.explanation.endpoint import ApiKey, EndpointBackend
from difflex.explanation.explaining import explain
from difflex.features import Book, ImageAlbum
from difflex.testing import plain_book

torch.set_num_threads(1)
MAX_RATIO = 1.3
"""Allowed time, as a multiple of calls x latency / connections."""
SERVER = "from difflex.testing.vlm import main; main()"


def measure(folder: Path, url: str, features: int, connections: int) -> tuple[float, int, int]:
    """Return the seconds, the calls and the number of features that are explained correctly."""
    with (
        closing(EndpointBackend(url, "rule", ApiKey("", "none"), connections=connections)) as backend,
        open_client(backend, folder) as client,
        Book.edit(plain_book(folder, features)) as book,
    ):
        start = time.monotonic()
        explain(book, range(features), client, ImageAlbum(folder / "images"), connections=connections, progress=False)
        seconds = time.monotonic() - start
        done = [row for row in book.explanations() if row.state == "done"]
        correct = sum(all(judgement.score == judgement.fires for judgement in book.judgements(row.id)) for row in done)
        return seconds, client.spending.calls, correct


def main() -> int:
    """Return 0 if the target is met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=1000)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--latency", type=float, default=0.2)
    args = parser.parse_args()
    command = [sys.executable, "-c", SERVER, "--latency", str(args.latency)]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server,
    ):
        assert server.stdin is not None and server.stdout is not None
        url = server.stdout.readline().strip()
        seconds, calls, correct = measure(Path(folder), url, args.features, args.connections)
        server.stdin.close()
        served = int(server.stdout.readline())
    ideal = calls * args.latency / args.connections
    print(
        f"  {calls:,} calls of {args.latency:g} s over {args.connections} connections: ideal {ideal:.1f} s, took {seconds:.1f} s"
    )
    print(f"  {correct:,} of {args.features:,} features complete and correct; the server received {served:,} calls")
    met = seconds <= MAX_RATIO * ideal and correct == args.features and served == calls
    print(f"explain: {seconds / ideal:.2f} times the ideal (target {MAX_RATIO}): {'met' if met else 'MISSED'}")
    return not met


if __name__ == "__main__":
    sys.exit(main())
