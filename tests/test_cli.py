"""The command line: verbs, flags, and how it ends."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from sample_study import new_study, write_book, write_dictionary, write_matches

import difflex
from difflex import cli
from difflex.cli import main, parse
from difflex.commands import VERBS, verb_class
from difflex.commands.flags import ModelCommand
from difflex.commands.models import models_table
from difflex.errors import BadInput, BrokenFile
from difflex.testing import tiny_folder


class PaintBox:
    """A pipeline that answers with plain images and remembers what it was asked."""

    def __init__(self):
        self.asked: list[dict[str, object]] = []

    def shots(self, prompts: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(pixels=(8, 8))]

    def generate(self, prompts: list[str], **how: object) -> list[SimpleNamespace]:
        self.asked.append({"prompts": prompts, **how})
        return [SimpleNamespace(image=Image.new("RGB", (8, 8), "red")) for _ in prompts]


@pytest.fixture
def paint_box(monkeypatch: pytest.MonkeyPatch) -> PaintBox:
    box = PaintBox()
    monkeypatch.setattr(ModelCommand, "load", lambda opening: box)
    return box


def model(root: Path, name: str, card: str | None) -> Path:
    """A model folder as `difflex models` sees it, with 2 MB of weights."""
    folder = root / name
    (folder / "vae").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "vae" / "weights.safetensors").write_bytes(bytes(2_000_000))
    if card is not None:
        (folder / "difflex.json").write_text(card)
    return folder


def raising(error: BaseException):
    def command() -> None:
        raise error

    return lambda words: command


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["help"]])
def test_help_lists_every_verb_in_one_line(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +{re.escape(entry.help)}$", shown, re.MULTILINE) for name, entry in VERBS.items())


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"difflex {difflex.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_leads_to_a_documented_class(verb: str):
    assert issubclass(verb_class(verb), cli.Command)
    assert verb_class(verb).__name__ == verb.title().replace("-", "") + "Command"
    assert (verb_class(verb).__doc__ or "").rstrip().endswith(".")


def test_an_unknown_verb_shows_the_nearest_and_exits_2(capsys: pytest.CaptureFixture[str]):
    assert main(["genrate"]) == 2
    assert "nearest: generate" in capsys.readouterr().err


def test_a_difflex_error_is_one_line_without_a_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "parse", raising(BadInput("Asked so, found so, do so.")))
    assert main(["generate"]) == 2
    assert capsys.readouterr().err == "difflex: Asked so, found so, do so.\n"


def test_an_internal_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "parse", raising(AssertionError("our own promise")))
    with pytest.raises(AssertionError):
        main(["generate"])


def test_an_interruption_exits_130_without_a_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "parse", raising(KeyboardInterrupt()))
    assert main(["generate"]) == 130
    assert capsys.readouterr().err == "\ndifflex: interrupted\n"


def test_a_warning_is_one_line_and_the_filters_are_left_as_they_were(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr(cli, "parse", lambda words: lambda: warnings.warn("The word 'cat' is new to it.", stacklevel=1))
    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["generate"]) == 0
    assert capsys.readouterr().err == "difflex: warning: The word 'cat' is new to it.\n"
    assert warnings.showwarning is before


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m difflex --help | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_a_terminal_cannot_show_is_written_as_numbers():
    code = "from difflex import cli; cli.parse = lambda words: lambda: print('\\u2026'); raise SystemExit(cli.main(['x']))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\u2026\n", "")


def test_python_m_difflex_ends_with_the_exit_code():
    done = subprocess.run([sys.executable, "-m", "difflex", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--seeds", "0:4"], "seeds", range(0, 4)),
        (["--seeds", "7:8"], "seeds", range(7, 8)),
        ([], "seeds", range(0, 1)),
        (["--pixels", "64"], "pixels", (64, 64)),
        (["--pixels", "64x96"], "pixels", (64, 96)),
        ([], "pixels", None),
        (["--steps", "4"], "steps", 4),
        (["--guidance", "2"], "guidance", 2.0),
    ],
)
def test_flags_of_generate_become_values(flags: list[str], field: str, value: object):
    assert getattr(parse(["generate", "mini-flux", "a star", *flags]), field) == value


@pytest.mark.parametrize(
    "flags",
    [
        ["--seeds", "-4"],
        ["--seeds", "4:4"],
        ["--seeds", "a:b"],
        ["--pixels", "0"],
        ["--pixels", "64x"],
        ["--steps", "x"],
        ["--sedes", "0:1"],
    ],
)
def test_a_wrong_flag_exits_2_and_is_named(flags: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["generate", "mini-flux", "a star", *flags])
    assert end.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_generate_gives_every_cell_its_prompt_and_seed(paint_box: PaintBox, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "new" / "grid.png"
    assert main(["generate", "mini-flux", "a star", "", "--seeds", "3:6", "--steps", "2", "--out", str(out)]) == 0
    how = {"seed": 3, "steps": 2, "pixels": None, "guidance": None}
    assert paint_box.asked == [{"prompts": ["a star"] * 3, **how}, {"prompts": [""] * 3, **how}]
    red = [count for count, colour in Image.open(out).convert("RGB").getcolors(10**6) or [] if colour == (255, 0, 0)]
    assert red == [6 * 160 * 160]
    assert str(out) in capsys.readouterr().out


def test_generate_draws_with_a_real_pipeline_and_shows_its_warnings_and_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder, out = str(tiny_folder("flux", tmp_path / "tiny", defaults={"words": ["a", "red", "star"]})), tmp_path / "grid.png"
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["generate", folder, "a red horse", "--seeds", "0:2", "--steps", "1", "--out", str(out)]) == 0
    assert "horse" in capsys.readouterr().err
    assert len(Image.open(out).convert("RGB").getcolors(10**6) or []) > 50
    assert main(["generate", folder, "a red star", "--pixels", "7x9", "--out", str(out)]) == 2
    assert "7" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["generate", "sites", "anatomy", "harvest"])
def test_commands_that_load_a_model_pass_on_their_flags(verb: str, monkeypatch: pytest.MonkeyPatch):
    asked: list[dict[str, object]] = []

    def load(name: str, **how: object) -> None:
        asked.append({"name": name, **how})
        raise BadInput("enough")

    monkeypatch.setattr(difflex, "load", load, raising=False)
    needed = {"generate": ["a star"], "anatomy": ["--prompts", "captions", "--out", "study"]}
    needed["harvest"] = ["--prompts", "captions", "--tokens", "1", "--site", "double.1", "--out", "study"]
    command = parse(
        [verb, "OWNER/NAME", *needed.get(verb, []), "--precision", "nf4", "--revision", "abc", "--untrained", "3", "--offload"]
    )
    assert isinstance(command, ModelCommand)
    with pytest.raises(BadInput, match="enough"):
        command.load()
    how = {"precision": "nf4", "revision": "abc", "untrained": 3, "offload": True, "offline": False, "text_length": None}
    assert asked == [{"name": "OWNER/NAME", **how}]


def test_generate_without_a_prompt_shows_an_example(capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "mini-flux"]) == 2
    assert 'difflex generate mini-flux "a red star on grass"' in capsys.readouterr().err


def test_generate_refuses_a_file_that_is_no_image_before_it_draws(paint_box: PaintBox, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "mini-flux", "a star", "--out", "grid.txt"]) == 2
    assert ".webp" in capsys.readouterr().err
    assert paint_box.asked == []


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--seeds", "0:1000000"], "1,000,000 images make a sheet"),
        (["--seeds", "0:200", "--out", "new.webp"], "new.webp can have 16,383 on a side"),
        (["--out", "x" * 300 + ".png"], "Use a shorter name"),
        (["--out", "folder.png"], "There is a folder where a file is needed"),
    ],
)
def test_generate_refuses_what_cannot_be_written_before_it_draws(
    words: list[str], complaint: str, paint_box: PaintBox, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    assert main(["generate", "mini-flux", "a star", *words]) == 2
    assert complaint in capsys.readouterr().err
    assert paint_box.asked == []


def test_generate_reports_a_file_that_cannot_be_written(paint_box: PaintBox, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    assert main(["generate", "mini-flux", "a star", "--out", str(tmp_path / "file" / "grid.png")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_models_shows_the_defaults_of_each_model(tmp_path: Path):
    card = {"pixels": [[64, 64], [64, 96]], "steps": 4, "guidance": 1.0, "words": ["a", "red", "star"], "description": "Small."}
    model(tmp_path, "mini-flux", json.dumps(card))
    model(tmp_path, "plain", None)
    (tmp_path / "notes").mkdir()
    head, mini, plain = [re.split(r" {2,}", line) for line in models_table(tmp_path).splitlines()]
    assert head == ["model", "pixels", "steps", "guidance", "words", "MB", "description"]
    assert mini == ["mini-flux", "64x64 64x96", "4", "1.0", "3", "2.0", "Small."]
    assert plain == ["plain", "-", "-", "-", "-", "2.0", "-"]


def test_models_reports_an_empty_package(tmp_path: Path):
    assert "No model" in models_table(tmp_path / "nothing")


def test_models_names_a_broken_file_of_defaults(tmp_path: Path):
    model(tmp_path, "mini-flux", '{"steps": ')
    with pytest.raises(BrokenFile, match=r"mini-flux.difflex\.json"):
        models_table(tmp_path)


def test_commands_that_only_read_files_run_without_torch(tmp_path: Path):
    study, name = new_study(tmp_path / "study"), "double.1/topk-8-k2"
    write_dictionary(study, name)
    write_book(study, name)
    write_matches(study, name, (0.9, 0.5, 0.4, 0.2))
    show = ["show", str(study.folder), "1", "--out", str(tmp_path / "sheet.png")]
    code = f"from difflex.cli import main; print([main(v) for v in (['models'], ['features', {str(study.folder)!r}], {show})])"
    code += "; import sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["[0, 0, 0]", "False"] and "0.90" in done.stdout


@pytest.mark.parametrize(
    ("environment", "spins"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")]
)
def test_threads_that_wait_soon_sleep_unless_the_environment_says_otherwise(environment: dict[str, str], spins: str):
    code = "from difflex.cli import main; main(['models']); import torch"
    inherited = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = {**inherited, **environment, "OMP_DISPLAY_ENV": "VERBOSE"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this build of torch uses another OpenMP")
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
