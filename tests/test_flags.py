"""Flags: every number is checked where it is parsed, and a flag is given once."""

from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from tyro.conf import Positional
from tyro.constructors import PrimitiveConstructorSpec

from difflex.cli import main, parse
from difflex.commands import VERBS, verb_class
from difflex.commands.checks import check_values
from difflex.commands.models import GenerateCommand
from difflex.commands.training import TrainCommand
from difflex.errors import DifflexError
from difflex.recipes import RECIPES
from difflex.study import Study

POSITIONAL = get_args(Positional[int])[1]


def parts(hint: object) -> Iterator[object]:
    """A type and all types and marks inside it."""
    yield hint
    for part in (*get_args(hint), *getattr(hint, "__metadata__", ())):
        yield from parts(part)


def words_with(verb: str, name: str, value: str) -> list[str]:
    """A command line of `verb` with `value` for the field `name`, and a word for whatever else is required."""
    hints, first, last = get_type_hints(verb_class(verb), include_extras=True), [], []
    for field in fields(verb_class(verb)):  # pyright: ignore[reportArgumentType]
        if field.name != name and field.default is not MISSING:
            continue
        word = value if field.name == name else "1"
        if POSITIONAL in parts(hints[field.name]):
            first.append(word)
        else:
            last.append(f"--{field.name.replace('_', '-')}={word}")
    return [verb, *first, *last]


NUMBERS = [
    (verb, field.name)
    for verb in VERBS
    for field in fields(verb_class(verb))  # pyright: ignore[reportArgumentType]
    if {int, float, range} & {*filter(lambda part: isinstance(part, type), parts(get_type_hints(verb_class(verb))[field.name]))}
]


def test_every_number_flag_is_declared_with_its_range():
    assert len(NUMBERS) > 70
    for verb, name in NUMBERS:
        marks = get_args(get_type_hints(verb_class(verb), include_extras=True)[name])
        assert any(isinstance(mark, PrimitiveConstructorSpec) for mark in marks), f"{verb} --{name}"


@pytest.mark.parametrize("verb", dict.fromkeys(verb for verb, _ in NUMBERS))
def test_every_number_flag_refuses_what_is_not_finite_too_large_or_negative(verb: str, capsys: pytest.CaptureFixture[str]):
    for name in (name for other, name in NUMBERS if other == verb):
        for value in ("nan", "inf", "-1e7", "1" + 40 * "0", "9" * 5000, "1e999", "x", ""):
            with pytest.raises(SystemExit) as end:
                main(words_with(verb, name, value))
            message = " ".join(line.strip("│╭╮╰╯─ ") for line in capsys.readouterr().err.splitlines())
            assert end.value.code == 2 and "Write " in message and len(message) < 1500, (verb, name, value, message)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["generate", "m", "--seeds", "0:1000000000"], "1,000,000,000 numbers"),
        (["generate", "m", "--seed", str(2**64)], "is not a range"),
        (["harvest", "m", "--site", "s", "--prompts", "p", "--out", "o", "--keep-steps", "0:4:0"], "is not a range"),
        (["generate", "m", "--seed", str(2**63)], "9223372036854775807"),
        (["generate", "m", "--pixels", "1000000"], "from 1 to 8,192"),
        (["show", "s", "1", "--side", "1000000"], "from 1 to 1,024"),
        (["steer", "s", "1", "--strength", "0:1000000:0.001"], "1,000,000,001 numbers"),
        (["steer", "s", "1", "--strength", "0:1:0.0000000000000000000001"], "numbers"),
        (["steer", "s", *map(str, range(2000))], "2,000 numbers"),
        (["train", "s", "--site", "a", "--size", "100000000000"], "from 1 to 10,000,000"),
        (["explain", "s", "--requests-per-minute", "nan"], "is not a number"),
        (["explain", "s", "--timeout", "inf"], "from 0.001 to 86,400"),
        (["explain", "s", "--budget", "nan"], "is not a number"),
        (["explain", "s", "--image-tokens", "-1"], "from 0 to"),
        (
            ["run", "mini", "--dry-run", "--gpu", "nonsense"],
            "is not an amount of GPU memory. Write a number and kB, MB, GB or TB: 24GB.",
        ),
        (["explain", "s", "--price", "1,1" + 400 * "0"], "out of range"),
        (["harvest", "m", "--site", "a", "--prompts", "p", "--out", "o", "--max-bytes", "9" * 400 + "TB"], "out of range"),
    ],
)
def test_a_number_without_bound_is_refused_with_its_limit(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert complaint in " ".join(line.strip("│ ") for line in capsys.readouterr().err.splitlines())


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["generate", "m", "--seeds", "0:2", "a", "--seed", "7"], "--seeds is given twice: 0:2 a and 7"),
        (["generate", "m", "--steps=3", "--steps", "4"], "--steps is given twice: 3 and 4"),
        (["generate", "m", "--key_a=1", "--key-a=2"], "--key-a is given twice: 1 and 2"),
        (["generate", "m", "--offload", "--offload"], "--offload is given twice"),
        (["generate", "m", "--offload=no"], "--offload takes no value, but was given 'no'"),
        (["generate", "m", "a\udcff"], "not UTF-8"),
        (["evaluate", "s", "--site"], "--site is given without a value"),
        (["evaluate", "s", "--site", "--offload"], "--site is given without a value"),
    ],
)
def test_a_flag_is_given_once_and_as_it_is_meant(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]):
    assert main(words) == 2
    assert complaint in capsys.readouterr().err


def test_words_after_two_dashes_are_no_flags():
    command = parse(["generate", "m", "--steps", "3", "--", "--steps", "--steps"])
    assert isinstance(command, GenerateCommand) and command.prompts == ("--steps", "--steps")


def test_the_values_of_a_command_from_a_recipe_are_checked_like_flags(tmp_path: Path):
    check_values(TrainCommand(study=tmp_path, site=("a",), k=(16, 32), learning_rate=1e-3))
    wrongs = [{"k": (0,)}, {"tokens": -1}, {"seed": 2**64}, {"learning_rate": float("nan")}, {"size": 3}, {"batch": "many"}]
    wrongs += [{"site": "double.1"}, {"study": "folder"}, {"kind": "topkk"}, {"log": ("console",)}, {"seed": True}]
    for wrong in wrongs:
        with pytest.raises(DifflexError, match=rf"TrainCommand\.{next(iter(wrong))} .*(is|unknown)"):
            check_values(TrainCommand(**{"study": tmp_path, "site": ("a",), **wrong}))


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_of_the_package_hold_values_that_the_command_line_accepts(name: str, tmp_path: Path):
    for command in RECIPES[name](tmp_path).commands:
        check_values(command)


WORK = (
    "train itda neurons evaluate concepts measure collect features show explain steer icon contrast steer-eval removal edit-bench"
    " compare"
)


@pytest.mark.parametrize("verb", WORK.split())
def test_a_command_that_finds_nothing_to_work_on_fails(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Study.begin("1", "mini-flux")
    words = words_with(verb, "", "")
    assert main([verb] if "studies" in get_type_hints(verb_class(verb)) else words) == 2
    assert main(words) == 2
    assert capsys.readouterr().err.count("difflex: ") == 2
