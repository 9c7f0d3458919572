"""Odd words for every flag of every verb: a command ends with code 0 or 2, and never with a traceback."""

import json
import shutil
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_flags import POSITIONAL, parts

from difflex.cli import main
from difflex.commands import VERBS, verb_class
from difflex.commands.study import command_words
from difflex.errors import DifflexError
from difflex.study import read_log
from difflex.testing import tiny_folder

pytestmark = pytest.mark.filterwarnings("ignore")

SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
LONG = "x" * 300
ODD = ["", " ", "-", "--", "---", "=", ",", ":", "0", "1", "2", "-1", "0:1", "1:0", "0.5", "nan", "inf", "1e999", "None", "True"]
ODD += ["9" * 400, "0x1", "1_0", "double.1", "double.*", "double.1:", "double.1:zzz", "single.0:update:text", "*", "**.*", "x/y"]
ODD += [
    "double.1/topk-8-k2",
    "double.1/",
    "/",
    "é",
    "\U0001d54f",
    "\n",
    "\t",
    "a\u202eb",
    "{}",
    "%s",
    "$HOME",
    "~nobody",
    "<b>",
    "'",
    '"',
]
ODD += [LONG, f"{LONG}/x", "x/" * 200, "captions", "known", "mini", "mini-flux", "http://", "http://[", "https://127.0.0.1:1/v1"]
ODD += ["http://127.0.0.1:99999", "OWNER/NAME", "OWNER/NAME:x", "density<", "peak>x", "concept=", "lpips", "clip:", "cpu"]
PLACES = ["study", "empty", "broken", "model", "file", "binary", "prompts.txt", "pairs.txt", "none", "image.png", "mine.py:study"]
WORDS = st.one_of(
    st.sampled_from(ODD),
    st.sampled_from(PLACES),
    st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="/~.\0"), max_size=8),
)
QUICK = {"site": "double.1", "prompts": "prompts.txt", "feature": "1", "features": "1", "name": "new", "recipe": "mine.py:study"}
QUICK |= {"steps": "1", "tokens": "256", "batch": "8", "images": "4", "trials": "1", "pairs": "1", "effect_shots": "0"}
QUICK |= {
    "max_prompts": "2",
    "random_features": "2",
    "judged_images": "2",
    "finding": "pairs",
    "groups": "colour",
    "concepts_per_group": "900",
}
"""Words with which commands take little time."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny study, an empty one, a broken one, a model, and files that are none of them."""
    root = tmp_path_factory.mktemp("fuzz")
    tiny_folder("flux", root / "model", defaults={"pixels": [[16, 24]]})
    (root / "prompts.txt").write_text("\n".join(f"star {number}" for number in range(40)))
    (root / "pairs.txt").write_text("a star\ta ring\n")
    (root / "file").write_text("words")
    (root / "binary").write_bytes(bytes(range(256)))
    (root / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (root / "mine.py").write_text("def study(folder):\n    return 7\n")
    harvest = ["harvest", str(root / "model"), "--prompts", str(root / "prompts.txt"), "--out", str(root / "study")]
    assert main([*harvest, "--site", "double.1", "--steps", "1"]) == 0
    train = ["train", str(root / "study"), "--site", "double.1", "--k", "2", "--size", "8", "--tokens", "512", "--batch", "64"]
    assert main(train) == 0
    shutil.copytree(root / "study", root / "broken")
    for path in (root / "broken").rglob("*.json"):
        if path.name != "study.json":
            path.write_bytes(b"{")
    shutil.copytree(root / "study", root / "empty", ignore=lambda folder, names: [name for name in names if name != "study.json"])
    return root


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A verb with what it needs to run quickly, but some of its words, and of the flags it does not need, are odd."""
    verb = draw(st.sampled_from([*VERBS]))
    hints, first, last = get_type_hints(verb_class(verb), include_extras=True), [], []
    odd = draw(st.sets(st.sampled_from(sorted(hints)), max_size=2)) if hints else set()
    for field in fields(verb_class(verb)):  # pyright: ignore[reportArgumentType]
        name = field.name
        if name not in odd and name not in QUICK and (field.default is not MISSING or name == "prompts"):
            continue
        if hints[name] is bool or "bool" in str(hints[name]):
            last.append(f"--{name.replace('_', '-')}")
            continue
        plain = {"model": "model", "out": "new"}.get(name, draw(st.sampled_from(["empty", "study", "broken"])))
        word = draw(WORDS) if name in odd else QUICK.get(name, plain)
        if POSITIONAL in parts(hints[name]):
            first.append(word)
        else:
            last.append(f"--{name.replace('_', '-')}={word}")
    return [verb, *first, *last]


@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=SLOW)
@given(words=command_lines())
def test_no_words_make_a_traceback(words: list[str], world: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
    assert code in (0, 2), words


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([*ODD, 10**400]) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.fixed_dictionaries(
    {
        "verb": st.sampled_from([*VERBS]) | JSON,
        "flags": st.dictionaries(st.sampled_from(["study", "site", "k", "seeds", "strength", "pixels", "seed", "x"]), JSON)
        | JSON,
        "outputs": st.lists(st.sampled_from(ODD)) | JSON,
    },
    optional={"seconds": st.floats() | JSON, "finished": st.just("2026-01-01") | JSON, "colour": JSON},
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=SLOW)
@given(records=st.lists(RECORDS, max_size=2) | JSON)
def test_no_edit_of_a_log_makes_another_error(records: object, world: Path):
    (world / "empty" / "run.json").write_text(json.dumps({"format": 2, "commands": records}))
    try:
        for record in read_log(world / "empty"):
            assert all(isinstance(word, str) for word in (*record.settings, *command_words(record)))
    except DifflexError:
        pass
    (world / "empty" / "run.json").unlink()
