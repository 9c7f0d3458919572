"""Recipes: each runs to its end, those for large models on random weights of their classes with tiny widths."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from difflex.cli import main
from difflex.commands.effects import FindingsCommand, RemovalCommand, SteerEvalCommand
from difflex.commands.evaluation import AnatomyCommand, ConceptsCommand, EvaluateCommand, TransferCommand
from difflex.commands.explain import ExplainCommand
from difflex.commands.features import CollectCommand
from difflex.commands.harvest import HarvestCommand
from difflex.commands.measures import BlockRolesCommand, MeasureCommand
from difflex.commands.training import ItdaCommand, NeuronsCommand, TrainCommand
from difflex.errors import BadInput, UnknownName
from difflex.evaluation import Evaluation
from difflex.evaluation.anatomy import Anatomy
from difflex.recipes import RECIPES, Recipe, mini, mini_full, recipe
from difflex.records import Site
from difflex.study import Command, Study, command_statuses, run_study
from difflex.testing import tiny_folder

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept:DeprecationWarning",  # of diffusers
    "ignore:.* prompts are longer than:UserWarning",  # the tiny models read few tokens
    "ignore:Normalisation '.*' leaves the mean at:UserWarning",  # as random activations lie
)

HERE = {
    "double.1": "double.0:update",
    "double.2": "double.1",
    "double.1:smooth": "double.0:update:smooth",
    "double.2:smooth": "double.1:smooth",
    "double.2:neurons": "double.1:neurons",
    "single.3": "single.2",
    "single.3:smooth": "single.2:smooth",
}
"""Where the tiny FLUX has what the recipes ask of the large one."""
DRAWN = {"pixels": [[64, 64], [16, 24]]}
"""Sizes that the tiny models can make: that of the drawn world, and a smaller one."""


def shrunk(study: Study, model: Path, prompts: Path) -> Study:
    """The same study of a tiny model, with small dictionaries of few tokens."""
    harvested = [site for command in study.commands if isinstance(command, HarvestCommand) for site in command.site]
    middle = "up.0.1:update" if harvested[0].startswith("down") else "double.1" if "double.2" in harvested else "double.1:smooth"

    def small(command: Command) -> Command:
        match command:
            case AnatomyCommand():
                return replace(command, model=str(model), prompts=str(prompts), pixels=(16, 24), steps=1, max_prompts=4)
            case HarvestCommand():
                sites, steps = tuple(HERE.get(site, site) for site in command.site), min(command.steps or 2, 2)
                tiny = {"model": str(model), "site": sites, "prompts": str(prompts), "pixels": (16, 24), "steps": steps}
                return replace(command, **tiny, tokens=1000, dtype="bf16")
            case NeuronsCommand():
                return replace(command, site=tuple(HERE.get(site, site) for site in command.site))
            case TrainCommand():
                sites = tuple(HERE.get(site, site) for site in command.site)
                return replace(command, site=sites, size=(32, 64)[: len(command.size)], k=(2, 3)[: len(command.k)], tokens=2000)
            case ItdaCommand():
                sites = tuple(HERE.get(site, site) for site in command.site)
                return replace(command, site=sites, size=(32, 24, 16)[: len(command.size) or 1], k=3, tokens=400)
            case EvaluateCommand():
                return replace(command, effect_shots=0)
            case ConceptsCommand():
                [site, *_] = [*(HERE.get(site, site) for site in command.site), middle]
                few = {"images": 150, "noise": (0.5,), "empty_prompts": True, "pixels": (64, 64)}
                return replace(command, site=(site,), dictionary=(), **few)
            case CollectCommand():
                sites = tuple(HERE.get(site, site) for site in command.site) or (middle,)
                return replace(
                    command,
                    site=sites,
                    dictionary=(),
                    images=24,
                    **({"prompts": str(prompts), "pixels": (16, 24), "steps": 1} if command.prompts else {"pixels": (64, 64)}),
                    top_examples=6,
                    random_examples=2,
                    silent_examples=2,
                )
            case ExplainCommand():
                return replace(command, dictionary=(), random_features=2, judged_images=2)
            case SteerEvalCommand():
                one = (f"{middle}/topk-32-k2",)
                return replace(
                    command, dictionary=one, groups=("colour",), min_ap=0.05, trials=1, pairs=1, strength=(1.0,), pixels=(64, 64)
                )
            case RemovalCommand():
                few = {
                    "groups": ("background",),
                    "images": 1,
                    "selection_images": 1,
                    "tuning_images": 1,
                    "features": (1,),
                    "strength": (0.0,),
                    "pixels": (64, 64),
                }
                return replace(command, dictionary=(f"{middle}/topk-32-k2",), **few)
            case FindingsCommand():
                few = {"groups": ("colour",), "concepts_per_group": 1, "trials": 1, "pairs": (1,), "strength": (0.1,)}
                return replace(command, site="double.1", pixels=(64, 64), **few)
            case MeasureCommand():
                return replace(command, dictionary=(), sample=2, images=2)
            case TransferCommand():
                return replace(command, model=None, dictionary=(), largest=True, steps=2, guidance=None, images=4)
            case BlockRolesCommand():
                return replace(command, study_or_model=str(model), prompts=str(prompts), pixels=(16, 24), images=2)
            case _:
                return command

    return replace(study, model=str(model), commands=tuple(map(small, study.commands)))


def planned(name: str, folder: Path) -> Study:
    """The study of a tiny model by the recipe `name`, in `folder`; the model and its prompts are next to it."""
    family = "sdxl" if "sdxl" in name else "flux"
    model, prompts = folder.parent / family, folder.parent / "prompts.txt"
    prompts.write_text("\n".join(f"star {number}" for number in range(400)))
    return shrunk(RECIPES[name](folder), model if model.exists() else tiny_folder(family, model, defaults=DRAWN), prompts)


def all_is_done(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    assert {status.state for status in command_statuses(study)} == {"done"}
    places = study.dictionaries()
    assert {place.site for place in places} == set(study.stores())
    assert all(Evaluation.load(study.evaluation(*place)).tokens for place in places)
    assert Anatomy.load(study.anatomy).norms
    assert "Study of" in (study.folder / "report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    run_study(study)
    assert capsys.readouterr().out.count("done already") == len(study.commands)


def real_depth(family: str, folder: Path, tokens: int = 2048) -> list[str]:
    """The flags of a model with the 19 + 38 blocks of FLUX.1, at a tiny width, and of a file of prompts, for `difflex run`."""
    model = tiny_folder(family, folder / family, layers=(19, 38), defaults={**DRAWN, "text_length": 8})
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(f"star {number}" for number in range(200)))
    return [
        "--model",
        str(model),
        "--prompts",
        str(prompts),
        "--pixels",
        "16x24",
        "--tokens",
        str(tokens),
        "--out",
        str(folder / "study"),
    ]


@pytest.mark.parametrize(
    ("recipe", "family", "flags", "tokens"),
    [
        ("flux_schnell", "flux", [], 1024),
        pytest.param("flux_schnell", "flux", ["--precision", "nf4"], 2048, marks=pytest.mark.slow),
        pytest.param("flux_dev", "flux-dev", [], 8192, marks=pytest.mark.slow),  # enough images for some to be held out
    ],
)
def test_one_command_makes_every_figure_of_the_paper(
    recipe: str, family: str, flags: list[str], tokens: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words, study = ["run", recipe, *real_depth(family, tmp_path, tokens), *flags], tmp_path / "study"
    assert main(words) == 0
    with open(study / "report" / "paper.csv", encoding="utf-8", newline="") as file:
        figures = {row["figure"]: row for row in csv.DictReader(file)}
    assert [*figures] == ["3", "4", "5", "6", "7", "8", "B"]
    assert {(row["state"], row["command"]) for row in figures.values()} == {("complete", "")}
    capsys.readouterr()
    assert main(words) == 0 and capsys.readouterr().out.count("done already") == 17


@pytest.mark.slow
def test_a_study_of_flux_is_planned_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["run", "flux_dev", *real_depth("flux-dev", tmp_path), "--precision", "nf4", "--dry-run"]) == 0
    assert "unknown" not in (table := capsys.readouterr().out) and table.count("to do") == 17
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("name", ["sdxl_turbo", pytest.param("mini_sdxl", marks=pytest.mark.slow)])
def test_the_study_of_an_sdxl_runs_to_its_end_and_again_does_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    study = planned(name, tmp_path / "study")
    run_study(study)
    all_is_done(study, capsys)


@pytest.mark.slow
def test_the_full_study_has_neurons_and_an_untrained_control(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    study = planned("mini_full", tmp_path / "study")
    run_study(study)
    all_is_done(study, capsys)
    control = Study.open(study.folder / "untrained")
    assert control.revision == "untrained-0" and Study.open(study.folder).revision is None
    (same,) = control.dictionaries()
    trained, untrained = (each.dictionary(*same) / "dictionary.safetensors" for each in (study, control))
    assert same in study.dictionaries() and trained.read_bytes() != untrained.read_bytes()
    assert all(each.concepts(*same).is_file() and each.evaluation(*same).is_file() for each in (study, control))
    kinds = {place.label.split("-")[0] for place in study.dictionaries() if place.site == Site.parse("double.1:neurons")}
    assert kinds == {"neurons"}
    study.folder.rename(tmp_path / "moved")
    assert {status.state for status in command_statuses(planned("mini_full", tmp_path / "moved"))} == {"done"}


@pytest.mark.slow
def test_new_prompts_repeat_everything_and_a_new_dictionary_only_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    study, prompts, messages = planned("mini", tmp_path / "study"), tmp_path / "prompts.txt", list[str]()
    run_study(study)
    all_is_done(study, capsys)
    before = {place: study.dictionary(*place).joinpath("dictionary.safetensors").read_bytes() for place in study.dictionaries()}
    anatomy, harvest, train, *rest = study.commands
    assert isinstance(train, TrainCommand)
    more = replace(study, commands=(anatomy, harvest, replace(train, k=(2, 3, 4)), *rest))
    run_study(more, until="evaluate", report=messages.append)
    after = {place: study.dictionary(*place).joinpath("dictionary.safetensors").read_bytes() for place in study.dictionaries()}
    assert after.items() >= before.items() and len(after) == len(before) + 1
    assert not [line for line in messages if "deleted" in line]
    prompts.write_text("\n".join(f"red moon {number}" for number in range(200)))
    run_study(study, until="evaluate", report=messages.append)
    assert len([line for line in messages if "deleted" in line]) >= 1 + len(before)
    for place, weights in before.items():
        assert study.dictionary(*place).joinpath("dictionary.safetensors").read_bytes() != weights


def test_a_study_is_planned_run_and_shown_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tiny_folder("flux", tmp_path / "flux")
    (tmp_path / "prompts.txt").write_text("\n".join(f"star {number}" for number in range(200)))
    (tmp_path / "mine.py").write_text(
        "from difflex.recipes import HarvestCommand, Study, TrainCommand\n"
        "def study(folder):\n"
        f"    prompts = {str(tmp_path / 'prompts.txt')!r}\n"
        f"    harvest = HarvestCommand(model={str(model)!r}, site=('double.1',), prompts=prompts, out=folder)\n"
        f"    train = TrainCommand(study=folder, site=('double.1',), k=(3,), size=(32,), tokens=2000)\n"
        f"    return Study(folder=folder, model={str(model)!r}, commands=(harvest, train))\n"
    )
    words, folder = ["run", f"{tmp_path / 'mine.py'}:study", "--out", str(tmp_path / "study")], tmp_path / "study"
    assert main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("to do") == 2 and not folder.exists()
    assert main([*words, "--until", "harvest"]) == 0 and "every command up to harvest is done" in capsys.readouterr().out
    assert main(words) == 0 and "[1 of 2] harvest: done already" in capsys.readouterr().out
    assert main(["status", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "double.1/topk-32-k3" in output and "tokens of width 32" in output and output.count("done") == 2
    manifest = folder / "activations" / "single.0" / "manifest.json"
    manifest.parent.mkdir()
    manifest.write_text(json.dumps({"format": 1}))
    assert main(["status", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "single.0: cannot be read" in output and "tokens of width 32" in output
    assert main(["run", "mimi"]) == 2 and "nearest: mini" in capsys.readouterr().err
    assert main(["status", str(tmp_path)]) == 2


def test_options_of_a_recipe_are_its_arguments_and_are_kept_for_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    model, folder = tiny_folder("flux", tmp_path / "flux"), tmp_path / "study"
    (tmp_path / "prompts.txt").write_text("\n".join(f"star {number}" for number in range(20)))
    (tmp_path / "mine.py").write_text(
        "from difflex.recipes import HarvestCommand, Study\n"
        "def study(folder, model, prompts, pixels=None):\n"
        "    harvest = HarvestCommand(model=model, site=('double.1',), prompts=prompts, pixels=pixels, out=folder)\n"
        "    return Study(folder=folder, model=model, commands=(harvest,))\n"
    )
    words = ["run", f"{tmp_path / 'mine.py'}:study", "--out", str(folder)]
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--model", "flux", "--prompts", "prompts.txt", "--pixels", "16x24", "--tokens", "9"]) == 2
    assert "takes --model, --prompts, --pixels, but --tokens was given. Add an argument" in capsys.readouterr().err
    assert main([*words, "--model", str(tmp_path), "--prompts", "prompts.txt"]) == 2
    capsys.readouterr()
    assert main(words) == 2  # nothing was begun with these options, and nothing is kept
    assert "As when" not in capsys.readouterr().out and not (folder / "study.json").exists()
    assert main([*words, "--model", "flux", "--prompts", "prompts.txt", "--pixels", "16x24"]) == 0
    assert Study.open(folder).settings.pixels == (16, 24) and Study.open(folder).model == str(model)
    monkeypatch.chdir("/")
    capsys.readouterr()
    assert main(words) == 0
    output = capsys.readouterr().out
    options = f"--model {model} --prompts {tmp_path / 'prompts.txt'} --pixels 16x24"
    assert f"As when this recipe last ran here: {options}" in output and "harvest: done already" in output
    assert main(["report", str(folder)]) == 0
    assert f"difflex run {words[1]} {options} --out STUDY" in (folder / "report.html").read_text(encoding="utf-8")
    assert main([*words, "--pixels", "32"]) == 0 and Study.open(folder).settings.pixels == (32, 32)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_every_option(name: str, tmp_path: Path):
    options = {"model": "mini-flux-small", "precision": "nf4", "prompts": "mine.txt", "pixels": (32, 64), "tokens": 5000}
    study = RECIPES[name](tmp_path, **options)
    assert study.model == "mini-flux-small"
    for command in study.commands:
        if isinstance(command, (AnatomyCommand, HarvestCommand)):
            assert all(getattr(command, key) == value for key, value in options.items() if key != "tokens")
        if isinstance(command, HarvestCommand):
            assert command.tokens is not None and command.tokens <= 5000


def test_the_studies_of_the_drawn_world_take_the_blocks_that_their_model_has(tmp_path: Path):
    sites = lambda study: [site for each in study.commands if isinstance(each, HarvestCommand) for site in each.site]  # noqa: E731
    small, usual = sites(mini(tmp_path, model="mini-flux-small")), sites(mini(tmp_path))
    assert (small, usual) == (["double.1:smooth"], ["double.2:smooth"])
    full = mini_full(tmp_path, model="mini-flux-small")
    plain, smooth = (
        ["double.1", "double.0", "single.0"],
        [f"{site}:smooth" for site in ("double.0", "double.1", "single.0", "single.1")],
    )
    assert sites(full) == [*plain, *smooth, "double.1:neurons", "double.1"]
    explained = next(each for each in full.commands if isinstance(each, ExplainCommand))
    assert explained.dictionary[-1] == "double.1:neurons/neurons-512-k16"
    with pytest.raises(BadInput, match=r"of a FLUX, but the blocks of '.*sdxl' are: down"):
        mini(tmp_path, model=str(tiny_folder("sdxl", tmp_path / "sdxl")))


def test_a_recipe_is_found_in_a_file(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text("from difflex.recipes import mini\n\ndef study(folder):\n    return mini(folder)\n")
    found: Recipe = recipe(f"{file}:study")
    assert found(tmp_path) == RECIPES["mini"](tmp_path)
    with pytest.raises(UnknownName, match="'stuby' is unknown; nearest: study"):
        recipe(f"{file}:stuby")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("def study(folder):\n    return )", "line 2, failed with SyntaxError: unmatched"),
        ("import nothing_of_this_name", "line 1, failed with ModuleNotFoundError: No module named"),
        ("def study(folder):\n    return 1 / 0", "line 2, failed with ZeroDivisionError"),
        ("def study(folder):\n    def inner():\n        raise SystemExit(0)\n    inner()", "line 3, failed with SystemExit"),
        ("def study():\n    pass", "failed with TypeError: study() takes 0 positional arguments"),
        ("x = " + 10_000 * "[", "failed with "),
        ("def study(folder):\n    return study(folder)", "line 2, failed with RecursionError"),
        ("\0", "failed with "),
        ("x = 1", "the function 'study' is unknown; none are known"),
        ("def study(folder):\n    return 7", "returned 7; return a difflex.Study"),
        ("def study(folder):\n    from difflex import Study\n    return Study(folder='x', model='m')", "its folder is a Path"),
        (
            "def study(folder):\n    from difflex import Study\n    return Study(folder=folder, model='m', commands=(7,))",
            "names 7 as",
        ),
        ("def study(folder):\n    from difflex import Study\n    return Study(folder=folder, model='m')", "has no commands"),
        (
            "from difflex.recipes import Study, TrainCommand\ndef study(folder):\n"
            "    return Study(folder=folder, model='m', commands=(TrainCommand(study=folder, site='double.1'),))",
            "TrainCommand.site is 'double.1', which is not a tuple, each item text",
        ),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_mistake_in_a_recipe_is_named_with_its_place(
    text: str, complaint: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "mine.py"
    file.write_text(text)
    assert main(["run", f"{file}:study", "--out", str(tmp_path / "study"), *flags]) == 2
    message = capsys.readouterr().err
    assert complaint in message and "Traceback" not in message and len(message) < 600
    assert not (tmp_path / "study").exists()


def test_what_is_no_file_is_no_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "binary.py").write_bytes(bytes(range(256)))
    for name in (tmp_path, tmp_path / "binary.py", tmp_path / ("x" * 300)):
        assert main(["run", f"{name}:study", "--out", str(tmp_path / "study")]) == 2
    assert capsys.readouterr().err.count("difflex: ") == 3


def test_an_endpoint_is_refused_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["run", "flux_schnell", "--vlm", "http://localhost/v1", "--out", str(tmp_path / "study")]) == 2
    assert "difflex explain STUDY --vlm ADDRESS --model NAME" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "study").exists()


def test_an_unknown_verb_to_stop_at_is_refused_in_a_dry_run_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["run", "mini", "--out", str(tmp_path / "study"), "--dry-run", "--until"]
    assert main([*words, "zzz"]) == 2 and "The verb 'zzz' is unknown" in capsys.readouterr().err
    assert main([*words, "harvest"]) == 0
    assert "harvest" in (output := capsys.readouterr().out) and "itda" not in output


def test_unknown_recipes_are_explained():
    with pytest.raises(UnknownName, match="'mimi' is unknown; nearest: mini"):
        recipe("mimi")
    with pytest.raises(BadInput, match=r"no file nowhere\.py"):
        recipe("nowhere.py:study")
