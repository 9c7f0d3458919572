"""The short form of `make attack`: a few commands in damaged, full and forbidden states, killed, and twice at once."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_nothing_is_lost_hangs_or_ends_with_a_traceback_whatever_the_state_of_the_disk() -> None:
    attack = subprocess.run(
        [sys.executable, "-m", "tests.attack", "--short"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert attack.returncode == 0, attack.stdout
