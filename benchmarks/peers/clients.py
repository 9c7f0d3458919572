"""Clients of learners that run in their own processes (see `serving.py`)."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PEERS = ("sparsify", "dictionary_learning", "sae_lens", "overcomplete")


class LearnerProcess:
    """A learner in another process; requests become method calls, as in `update(count=3)`."""

    def __init__(self, process: "subprocess.Popen[str]", name: str) -> None:
        self._process, self._name = process, name

    def __getattr__(self, request: str):
        def ask(**arguments: Any) -> dict[str, Any]:
            assert self._process.stdin is not None and self._process.stdout is not None
            print(json.dumps({"do": request, **arguments}), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
            if not answer:
                raise SystemExit(f"{self._name} ended early; start benchmarks/peers/ by hand to see why")
            return json.loads(answer)

        return ask


@contextmanager
def start_learners(names: list[str], python: Path) -> Iterator[dict[str, LearnerProcess]]:
    """Start the learners of these names; peers run in `python`, ours in this interpreter."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(_start(name, python)) for name in names}


@contextmanager
def _start(name: str, python: Path) -> Iterator[LearnerProcess]:
    kind = name.split()[0]  # "ours default" is another process of ours
    words = [sys.executable, str(HERE / "ours.py")] if kind == "ours" else [str(python), str(HERE / f"{kind}_.py")]
    with subprocess.Popen(words, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        yield LearnerProcess(process, name)
        assert process.stdin is not None
        process.stdin.close()
