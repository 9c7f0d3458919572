"""The first hour: ten tasks of a newcomer, as a user types them. No output may leave one without the next step."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sample_study import CONCEPTS, write_matches
from test_docs import TEXTS, blocks

from difflex.cli import main
from difflex.testing import tiny_folder

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")  # of diffusers

SITE = "double.2:smooth"
SAE, ITDA = f"{SITE}/topk-256-k16", f"{SITE}/itda-64-k16-over0.3-first2048"
IMAGES = ["--images", "40", "--patches", "0"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small study of mini-flux, as the demo makes a large one; in it, a feature detects red."""
    folder = tmp_path_factory.mktemp("first-hour") / "demo"
    harvest = ["harvest", "mini-flux", "--site", SITE, "--prompts", "captions", "--tokens", "4000", "--steps", "4"]
    assert main([*harvest, "--out", str(folder)]) == 0
    assert main(["train", str(folder), "--site", SITE, "--size", "256", "--k", "16", "--tokens", "10000", "--batch", "256"]) == 0
    assert main(["itda", str(folder), "--site", SITE, "--threshold", "0.3", "--size", "64", "--k", "16", "--tokens", "2048"]) == 0
    assert main(["evaluate", str(folder), "--effect-shots", "0"]) == 0
    assert main(["collect", str(folder), "--drawn-world", "--noise", "0.5", *IMAGES]) == 0
    from difflex.study import Study

    write_matches(Study.open(folder), SAE, (0.9, 0.8, 0.7, 0.6), per_concept=1)
    write_matches(Study.open(folder), ITDA, (0.6, 0.7, 0.6, 0.4), per_concept=1)
    return folder


@pytest.fixture
def here(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's own, with the study in it, which is the working directory."""
    shutil.copytree(study, tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(line: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    """Run a line of the shell and return what it prints; without a traceback, in sentences."""
    capsys.readouterr()
    words = shlex.split(line)
    assert words.pop(0) == "difflex"
    try:
        result = main(words)
    except SystemExit as end:
        result = end.code
    output = "".join(capsys.readouterr())
    assert result == code, output
    assert "Traceback" not in output and "Error(" not in output
    return output


def in_process(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "200"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)


def last_commands(output: str) -> list[str]:
    """The commands that an output ends with."""
    return re.findall(r"^difflex (?!:).*", output, re.MULTILINE)


def test_red_is_found_looked_at_and_steered_with_by_the_commands_that_are_printed(here: Path, capsys: pytest.CaptureFixture[str]):
    found = typed("difflex search demo red", capsys)
    assert "detects red, AP 0.90" in found
    show, steer = last_commands(found)
    shown = typed(show, capsys)
    assert (here / "feature-1.png").is_file() and last_commands(shown)[0].startswith(steer.partition(" '")[0])
    assert str(here / "steered.png") in typed(steer, capsys)
    assert " red" not in steer.partition("--prompt")[2]


def test_a_name_is_taken_at_once(here: Path, capsys: pytest.CaptureFixture[str]):
    assert f"red: feature 1 of {SAE} (detects red, AP 0.90)" in typed("difflex show demo red", capsys)
    steered = typed("difflex steer demo red --prompt 'a ring on paper' --region 0,0,0.5,1 --out ring.png", capsys)
    assert "strength" in steered and (here / "ring.png").is_file()


@pytest.mark.filterwarnings("ignore:.*is dead")
def test_red_is_erased(here: Path, capsys: pytest.CaptureFixture[str]):
    output = typed("difflex erase demo red --prompt 'a red star on grass'", capsys)
    assert f"red: features 1, 0 of {SAE}; codes times" in output and "1 image before and after" in output
    assert (here / "erased.png").is_file()


def test_a_sdxl_folder_is_studied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    tiny_folder("sdxl", tmp_path / "my-sdxl", defaults={"pixels": [[32, 32]], "steps": 1, "guidance": 0.0})
    Path("prompts.txt").write_text("\n".join(f"a {colour} dog, photo {i}" for i in range(12) for colour in ("red", "blue")))
    sites = typed("difflex sites ./my-sdxl", capsys)
    site = re.findall(r"^(mid\S*)", sites, re.MULTILINE)[0]
    typed(f"difflex harvest ./my-sdxl --site {site} --prompts prompts.txt --out my-sdxl-study", capsys)
    typed(f"difflex train my-sdxl-study --site {site} --size 32 --k 4 --batch 16", capsys)
    assert "that fire" in typed(f"difflex collect my-sdxl-study {shlex.join(IMAGES)}", capsys)
    listed = typed("difflex features my-sdxl-study --top 1", capsys)
    feature = re.findall(r"^\s*(\d+) ", listed, re.MULTILINE)[-1]
    [steer] = last_commands(typed(f"difflex show my-sdxl-study {feature}", capsys))
    typed(f"{steer} --strength 1", capsys)


@pytest.mark.slow
def test_the_quickstart_runs_in_a_process_of_its_own(tmp_path: Path):
    [code, *_] = blocks(TEXTS["README.md"], "python")
    code = code.replace("100_000", "6_000").replace("size=2048", "size=128").replace("ring.png", str(tmp_path / "ring.png"))
    few = "import difflex.explore.search as search, difflex.explore.workspace as workspace\n"
    few += "workspace.IMAGES, search.SPECIFIC, search.MIN_IMAGES = {True: 24, False: 24}, -9.0, 1\n"
    result = in_process("-c", few + code)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "ring.png").is_file() and "Traceback" not in result.stderr


def test_a_study_is_shared(here: Path, capsys: pytest.CaptureFixture[str]):
    [status] = last_commands(typed("difflex pack demo", capsys))
    assert f"\n  {SAE}\n" in typed(status, capsys)
    (here / "colleague").mkdir()
    shutil.move("demo.zip", "colleague/theirs.zip")
    os.chdir(here / "colleague")
    assert "theirs.zip: unpacked to theirs-" in typed("difflex search theirs.zip red", capsys)
    shown = typed("difflex show theirs.zip red", capsys)
    assert f"red: feature 1 of {SAE}" in shown and "unpacked" not in shown
    typed("difflex steer theirs.zip red --prompt 'a ring' --strength 1", capsys)
    assert "report.html" in typed("difflex report theirs.zip", capsys)


def test_an_sae_is_compared_with_itda(here: Path, capsys: pytest.CaptureFixture[str]):
    for names in (f"{SAE} {ITDA}", f"{SAE},{ITDA}"):
        output = typed(f"difflex compare demo --dictionary {names}", capsys)
        assert re.search(r"FVU +0\.\d+ +0\.\d+ ", output) and re.search(r"AP of red +0\.900 +0\.600 +-0\.300", output)
    message = typed(f"difflex compare demo --dictionary {SAE}", capsys, code=2)
    assert "--dictionary SITE/LABEL SITE/LABEL" in message and "difflex status demo" in message


def test_the_cost_is_known_beforehand(here: Path, capsys: pytest.CaptureFixture[str]):
    plan = typed("difflex run mini --dry-run --out new", capsys)
    assert re.search(r"^ *total .*(min|s|h)", plan, re.MULTILINE) and "For the CPU of this machine" in plan
    assert not Path("new").exists()
    unknown = typed("difflex run sdxl_turbo --dry-run", capsys)
    assert "0 bytes" not in unknown and "Most on disk at once: unknown" in unknown
    assert re.search(r"^1 .*kB|MB", typed(f"difflex train demo --site {SITE} --dry-run", capsys), re.MULTILINE)


def test_help_is_found():
    overview = in_process("-m", "difflex", "--help")
    assert overview.returncode == 0 and all(verb in overview.stdout for verb in ("search", "steer", "erase", "report"))
    steer = in_process("-m", "difflex", "steer", "--help")
    assert steer.returncode == 0 and "--prompt" in steer.stdout and "FEATURE" in steer.stdout
    misspelt = in_process("-m", "difflex", "shwo", "demo", "red")
    assert misspelt.returncode == 2 and "nearest: show" in misspelt.stderr and "Traceback" not in misspelt.stderr


def test_what_is_misspelt_is_answered_with_what_is_near(here: Path, capsys: pytest.CaptureFixture[str]):
    for line in ("show demo rde", "steer demo rde --prompt x", "erase demo rde", "icon demo rde", "search demo rde"):
        message = typed(f"difflex {line}", capsys, code=2)
        assert "'rde' is unknown; nearest: red" in message and "features demo" in message, message
    site = typed("difflex train demo --site doble.2:smooth", capsys, code=2)
    assert "nearest: double.2:smooth" in site
    wrong = typed("difflex harvest mini-flux --site doble.2 --prompts captions --tokens 100 --out new", capsys, code=2)
    assert "nearest: double.2" in wrong and "difflex sites" in wrong
    assert f"nearest: {SAE}" in typed(f"difflex show demo 1 --dictionary {SITE}/topk-256-k61", capsys, code=2)


def test_a_study_may_have_the_name_of_its_model(here: Path, capsys: pytest.CaptureFixture[str]):
    shutil.move("demo", "mini-flux")
    typed("difflex steer mini-flux red --prompt 'a ring' --strength 1", capsys)
    assert CONCEPTS[0].name == "red"
