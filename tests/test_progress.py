"""Progress in a log: a line now and then, and none for short work."""

import io
import sys

import pytest

from difflex import progress
from difflex.progress import ProgressBar


def log(monkeypatch: pytest.MonkeyPatch, every: float, show: bool = True, total: int | None = 4) -> list[str]:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "EVERY", every)
    with ProgressBar(total=total, desc="training", unit=" tokens", show=show) as bar:
        for _ in range(4):
            bar.update(1)
            bar.set_postfix_str("FVU 0.1")
    return stream.getvalue().splitlines()


def test_a_log_has_a_line_for_each_interval_and_none_for_short_work(monkeypatch: pytest.MonkeyPatch):
    lines = log(monkeypatch, every=1e-9)
    assert len(lines) >= 2 and all(line.startswith("training: ") and "of 4 tokens in 00:00" in line for line in lines)
    assert "FVU 0.1" in lines[-1]
    assert log(monkeypatch, every=30.0) == []
    assert log(monkeypatch, every=1e-9, show=False) == []


def test_work_of_unknown_length_does_not_say_how_long_it_still_takes(monkeypatch: pytest.MonkeyPatch):
    lines = log(monkeypatch, every=1e-9, total=None)
    assert lines and not any("?" in line or "to go" in line for line in lines)
