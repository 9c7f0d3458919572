"""Explaining 1,000 features against a model that answers by rule, in a process of its own, over 16 connections.

Every call takes a fixed latency there; whatever more the whole takes is ours: planning, drawing, asking, checking, keeping.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from difflex.explanation import AnswerCache, ApiKey, CachedClient, EndpointBackend, ExplanationProtocol, explain
from difflex.features import Book, ImageAlbum
from difflex.testing import plain_book

torch.set_num_threads(1)
BAR = 1.3
"""Times calls x latency / connections."""
SERVER = "from difflex.testing.vlm import main; main()"


def explained(folder: Path, url: str, features: int, connections: int) -> tuple[float, int, int]:
    """Seconds, calls, and features that are complete and correct."""
    album, answers = ImageAlbum(folder / "images"), AnswerCache(folder / "answers.sqlite")
    endpoint = EndpointBackend(url, "rule", ApiKey("", "nobody"), connections=connections)
    asker = CachedClient(endpoint, answers)
    with Book.edit(plain_book(folder, features)) as book:
        began = time.monotonic()
        explain(book, range(features), asker, album, ExplanationProtocol(), connections=connections, progress=False)
        took = time.monotonic() - began
        done = [each for each in book.explanations() if each.state == "done"]
        right = sum(all(judgement.score == judgement.fires for judgement in book.judgements(each.id)) for each in done)
    endpoint.close()
    answers.close()
    return took, asker.asked.spent.calls, right


def main() -> int:
    """0 if the bar is met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=1000)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--latency", type=float, default=0.2)
    wanted = parser.parse_args()
    words = [sys.executable, "-c", SERVER, "--latency", str(wanted.latency)]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server,
    ):
        assert server.stdin is not None and server.stdout is not None
        url = server.stdout.readline().strip()
        took, calls, right = explained(Path(folder), url, wanted.features, wanted.connections)
        server.stdin.close()
        served = int(server.stdout.readline())
    ideal = calls * wanted.latency / wanted.connections
    print(
        f"  {calls:,} calls of {wanted.latency:g} s over {wanted.connections} connections: ideal {ideal:.1f} s, took {took:.1f} s"
    )
    print(f"  {right:,} of {wanted.features:,} features complete and correct; the server was asked {served:,} times")
    met = took <= BAR * ideal and right == wanted.features and served == calls
    print(f"explain: {took / ideal:.2f} times the ideal (bar {BAR}): {'met' if met else 'MISSED'}")
    return not met


if __name__ == "__main__":
    sys.exit(main())
