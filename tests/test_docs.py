"""The docs: every verb, flag and station is in them, and what they show runs."""

import re
import shlex
from pathlib import Path

import pytest

from difflex.cli import main, parse
from difflex.commands import VERBS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}


def blocks(text: str, language: str) -> list[str]:
    """The blocks of code in `text` that are marked with `language`."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [code for mark, code in found if mark == language]


def commands(text: str) -> list[list[str]]:
    """The words of every line that starts with `difflex` in the shell blocks of `text`."""
    lines = [line for block in blocks(text, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("difflex ")]


def sections(text: str) -> list[str]:
    """`text` cut at its headings."""
    return re.split(r"^(?=#+ )", text, flags=re.MULTILINE)


def undocumented(flags: dict[str, set[str]], texts: list[str]) -> list[str]:
    """Verbs that no text names, and flags that no section about their verb names."""
    found = []
    for verb, names in flags.items():
        about = [part for text in texts for part in sections(text) if re.search(rf"difflex {verb}\b", part)]
        found += [] if about else [f"difflex {verb}"]
        found += [f"difflex {verb} {flag}" for flag in sorted(names) if not any(re.search(rf"{flag}\b", part) for part in about)]
    return found


def stations(tree: str) -> set[str]:
    """The names of the first level in a drawn file tree."""
    return {name.strip("/") for name in re.findall(r"^[├└]── (\S+)", tree, flags=re.MULTILINE)}


def flags_of(verb: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The flags and the positional words that `difflex VERB --help` shows."""
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    shown = capsys.readouterr().out
    # The border of the box is drawn in ASCII where the terminal asks for it; wrapped words of help are indented further.
    lines = re.findall(r"^\W{1,2}((?:--[\w-]+|[A-Z]+)\b.*)", shown, flags=re.MULTILINE)
    return {name for line in lines for name in (re.findall(r"(?<![\w-])--[\w-]+", line) or [re.split(r"\W", line)[0]])}


def test_every_verb_and_flag_is_documented(capsys: pytest.CaptureFixture[str]):
    flags = {verb: flags_of(verb, capsys) for verb in VERBS}
    assert flags["generate"] >= {"MODEL", "PROMPT", "--seeds", "--out"}
    assert undocumented(flags, list(TEXTS.values())) == []


def test_a_planted_verb_and_a_planted_flag_are_found_missing():
    text = "# One\n`difflex draw` takes `--ink`.\n# Two\n`difflex sell` has no `--inkwell`"
    wanted = {"draw": {"--ink"}, "sell": {"--ink", "PRICE"}, "buy": set()}
    assert undocumented(wanted, [text]) == ["difflex sell --ink", "difflex sell PRICE", "difflex buy"]


def test_the_readme_draws_the_stations_that_exist():
    [tree] = [block for block in blocks(TEXTS["README.md"], "") if block.startswith("src/difflex/")]
    files = {path.name for path in (ROOT / "src" / "difflex").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert stations(tree) == files - {"__main__.py", "__pycache__"}


def test_a_drawn_tree_is_read_to_its_first_level():
    assert stations("src/\n├── a.py     one\n│   └── b.py\n└── c/   two\ntests/ three") == {"a.py", "c"}


@pytest.mark.parametrize(
    "words", [pytest.param(words, id=shlex.join(words)) for text in TEXTS.values() for words in commands(text)]
)
def test_every_command_shown_is_understood(words: list[str]):
    assert callable(parse(words))


def test_a_planted_wrong_command_is_found():
    [words] = commands(
        "```sh\nmake test\ndifflex generate mini-flux \\\n  'a star' --sedes 0:4  # wrong\n```\n```\ndifflex no\n```"
    )
    assert words == ["generate", "mini-flux", "a star", "--sedes", "0:4"]
    with pytest.raises(SystemExit):
        parse(words)


@pytest.mark.parametrize("page", [page for page in TEXTS if blocks(TEXTS[page], "python")])
def test_the_python_shown_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    # Enough to run the code, not to learn much: a search then finds features that hardly fit.
    monkeypatch.setattr("difflex.explore.workspace.IMAGES", {True: 24, False: 24})
    monkeypatch.setattr("difflex.explore.search.SPECIFIC", -10.0)
    monkeypatch.setattr("difflex.explore.search.MIN_IMAGES", 1)
    names: dict[str, object] = {}
    for block in blocks(TEXTS[page], "python"):
        exec(compile(block.replace("tokens=100_000", "tokens=6_000"), page, "exec"), names)


def test_every_file_and_image_linked_is_there():
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))]
    assert [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()] == []
