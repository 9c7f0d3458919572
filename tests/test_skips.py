"""What is said of skipped tests, and that a missing browser is not passed over where there should be one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TINY = """
import pytest
from real_browser import browser

def test_page(browser): ...
def test_other_page(browser): ...
def test_link(): pytest.skip("no links here")
"""


@pytest.mark.parametrize(("environment", "code"), [({}, 0), ({"DIFFLEX_BROWSER": "required"}, 1)], ids=["skipped", "required"])
def test_a_missing_browser_is_named_at_the_end_or_an_error(tmp_path: Path, environment: dict[str, str], code: int):
    (tmp_path / "conftest.py").write_text("from skips import pytest_terminal_summary\n")
    (tmp_path / "test_tiny.py").write_text(TINY)
    variables = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(HERE), "DIFFLEX_BROWSER": "", **environment}
    words = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(tmp_path), "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(words, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stdout
    _, title, summary = done.stdout.partition("NOT TESTED")
    assert title and "1 test skipped: no links here (test_tiny.py)" in summary
    assert ("2 tests skipped: no browser: install chromium" in summary) == (code == 0)
    assert code == 0 or "Failed: no browser: install chromium" in done.stdout


@pytest.mark.parametrize(
    ("apt", "said", "variable"),
    [
        ('echo "#!/bin/sh" > "$BIN/chromium"; chmod +x "$BIN/chromium"', "", "required"),
        ("exit 100", "NO BROWSER", ""),
    ],
    ids=["installed", "no network"],
)
def test_the_ci_installs_a_browser_or_says_that_there_is_none(tmp_path: Path, apt: str, said: str, variable: str):
    root, tools = tmp_path / "root", tmp_path / "tools"
    (root / ".ci").mkdir(parents=True)
    tools.mkdir()
    (root / ".ci" / "run").write_bytes((HERE.parent / ".ci" / "run").read_bytes())
    scripts = {"apt-get": apt, "id": "echo 0", "make": 'echo "make $1 browser=$DIFFLEX_BROWSER"'}
    for name, script in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\nBIN={tools}\n{script}\n")
        (tools / name).chmod(0o755)
    for name in ("bash", "sh", "dirname", "chmod", "seq"):
        (tools / name).symlink_to(next(path for path in (Path("/bin") / name, Path("/usr/bin") / name) if path.exists()))
    done = subprocess.run(["bash", str(root / ".ci" / "run")], env={"PATH": str(tools)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("make")] == [
        f"make {target} browser={variable}" for target in ("test", "style", "docs")
    ]
    assert (said in done.stdout) and (bool(said) == ("NO BROWSER" in lines[-1])), "also as the last line"
