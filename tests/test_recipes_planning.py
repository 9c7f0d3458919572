"""`difflex run --dry-run`: what a study would take, against what it took."""

import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from difflex.choices import Precision
from difflex.cli import main
from difflex.commands.effects import FindingsCommand, RemovalCommand, SteerEvalCommand
from difflex.commands.estimates import estimate
from difflex.commands.evaluation import AnatomyCommand, EvaluateCommand
from difflex.commands.explain import ExplainCommand
from difflex.commands.forecast import (
    CostEstimate,
    DictionaryForecast,
    Forecast,
    Machine,
    PlannedCommand,
    StoreForecast,
    duration,
    most_on_disk,
    plan,
    plan_table,
    this_machine,
)
from difflex.commands.harvest import HarvestCommand
from difflex.commands.study import ReportCommand
from difflex.commands.training import ItdaCommand, NeuronsCommand, TrainCommand
from difflex.devices import gather_rate, machine_rate
from difflex.recipes import RECIPES
from difflex.records import Shot, Site
from difflex.study import Command, Study, run_study
from difflex.testing import tiny_folder

pytestmark = pytest.mark.filterwarnings("ignore:Normalisation '.*' leaves the mean at:UserWarning")

MEMORY = 2 * 10**10
MACHINE = Machine.with_cpu(1e11, MEMORY)
SCALING = 65_536 * (192 * 2048 + 60 * 32 * 192 + 1e6)
"""Operations that measure the units of a dictionary of 2,048 features."""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The study of a tiny model, not yet run."""
    root = tmp_path_factory.mktemp("planning")
    model = tiny_folder("flux", root / "tiny-flux")
    (root / "prompts.txt").write_text("\n".join(f"red star {number}" for number in range(1200)))
    folder, site, inner = root / "study", "double.1", "double.1:neurons"
    where = {"model": str(model), "prompts": str(root / "prompts.txt"), "pixels": (16, 24), "out": folder}
    return Study(
        folder=folder,
        model=str(model),
        commands=(
            AnatomyCommand(**where, max_prompts=8),
            HarvestCommand(**where, site=(site, inner)),
            TrainCommand(study=folder, site=(site,), k=(2, 3), size=(256, 512), tokens=4000),
            TrainCommand(study=folder, site=(site,), k=(2,), size=(256,), tokens=4000, preset="paper"),
            ItdaCommand(study=folder, site=(site,), k=3, size=(512,), tokens=4000),
            NeuronsCommand(study=folder, site=(inner,), k=(4,)),
            EvaluateCommand(study=folder, effect_shots=0),
        ),
    )


@pytest.fixture(scope="module")
def before(study: Study) -> list[PlannedCommand]:
    """Return the plan from before the study was run, and run it."""
    planned = plan(study, MACHINE, estimate)
    assert not study.folder.exists()
    run_study(study)
    return planned


def test_disk_is_predicted_to_within_a_tenth(study: Study, before: list[PlannedCommand]):
    expected, found = (
        [each.estimate.bytes or 0 for each in before],
        [each.estimate.bytes or 0 for each in plan(study, MACHINE, estimate)],
    )
    assert sum(expected) == pytest.approx(sum(found), rel=0.1)
    verbs = [each.status.record.verb for each in before]
    for verb, size, there in zip(verbs, expected, found, strict=True):
        if verb in ("harvest", "train"):
            assert size == pytest.approx(there, rel=0.1), verb


def test_tokens_and_sites_are_those_of_the_stores(study: Study, before: list[PlannedCommand]):
    planned = {each.status.record.verb: each.estimate for each in before}
    assert planned["harvest"].sites == ("double.1", "double.1:neurons")
    assert planned["harvest"].tokens == 2 * 1200 * 2 * 24  # sites x prompts x steps x tokens
    assert planned["evaluate"].tokens == pytest.approx(7 * 0.1 * 1200 * 2 * 24, rel=0.2)
    assert not [each.estimate.unknown for each in before if each.estimate.unknown]


def test_finished_commands_show_their_real_seconds_and_bytes(study: Study, before: list[PlannedCommand]):
    for planned, now in zip(before, plan(study, MACHINE, estimate), strict=True):
        assert planned.status.state == "to do" and planned.estimate.seconds != now.estimate.seconds
        assert now.status.state == "done" and now.estimate.seconds == now.status.record.seconds
    (train, *_) = [each for each in plan(study, MACHINE, estimate) if each.status.record.verb == "train"]
    files = [path for folder in train.status.record.outputs for path in (study.folder / folder).rglob("*") if path.is_file()]
    assert train.estimate.bytes == sum(path.stat().st_size for path in files)
    assert "about" not in plan_table(plan(study, MACHINE, estimate), MACHINE) and "about" in plan_table(before, MACHINE)


def test_a_faster_machine_takes_less_time_and_more_work_takes_more(study: Study, before: list[PlannedCommand]):
    harvest, train = study.commands[1], study.commands[2]
    assert isinstance(train, TrainCommand)
    forecast = Forecast(MACHINE)
    estimate(forecast, harvest)
    slow, fast = (
        estimate(replace(forecast, machine=Machine.with_cpu(rate, MEMORY)), train).seconds or 0 for rate in (1e11, 2e11)
    )
    more = estimate(forecast, replace(train, tokens=8000)).seconds or 0
    assert more - slow == pytest.approx(2 * (slow - fast))
    assert slow > fast


def test_planning_writes_nothing_and_uses_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it asked the network"))
    monkeypatch.chdir(tmp_path)
    planned = plan(RECIPES["sdxl_turbo"](tmp_path / "study"), MACHINE, estimate)
    assert os.listdir(tmp_path) == []
    assert [each.estimate.seconds for each in planned] == [None] * len(planned)
    assert [each.estimate.tokens for each in planned[1:3]] == [4 * 400_000, 4 * 38_400_000]
    table = plan_table(planned, MACHINE)
    assert "2: unknown: the model stabilityai/sdxl-turbo is not on this machine" in table and "0 s and" not in table


@dataclass(frozen=True, kw_only=True)
class Silent(Command):
    """A command without an estimate."""

    def __call__(self) -> None:
        pass


def test_a_command_without_an_estimate_is_unknown(tmp_path: Path):
    (planned,) = plan(Study(folder=tmp_path, model="mini-flux", commands=(Silent(),)), MACHINE, estimate)
    assert planned.estimate == CostEstimate(unknown="there is no estimate for this command")


def test_errors_of_a_command_are_shown_in_its_line(tmp_path: Path):
    harvest = HarvestCommand(model="mini-flux", site=("double.77",), prompts="captions", tokens=1000, out=tmp_path / "study")
    train = TrainCommand(study=tmp_path / "study", site=("double.77",))
    planned = plan(Study(folder=tmp_path / "study", model="mini-flux", commands=(harvest, train)), MACHINE, estimate)
    assert "double.77" in planned[0].estimate.unknown and "not known" in planned[1].estimate.unknown


def test_commands_know_what_those_before_them_will_have_written():
    study, site = Path("study"), Site("double.1")
    forecast = Forecast(
        Machine.with_cpu(1.0, MEMORY),
        stores={(study, site): StoreForecast(100, 4, 8, Shot(model="m", pixels=(8, 8), steps=1, guidance=0.0))},
    )
    for size in (16, 32):
        estimate(forecast, TrainCommand(study=study, site=(str(site),), size=(size,), k=(2,)))
    assert forecast.store(study, site).rows == 100
    assert [each.size for each in forecast.dictionaries[study, site]] == [16, 32]


def test_the_full_study_of_mini_flux_is_planned_to_take_more_than_an_hour(tmp_path: Path):
    planned = plan(RECIPES["mini_full"](tmp_path / "study"), Machine.with_cpu(2e11, MEMORY), estimate)  # two cores
    assert 3000 < sum(each.estimate.seconds or 0 for each in planned) < 6000


@pytest.mark.parametrize("name", ["mini", "mini_full"])
def test_every_command_of_the_recipes_of_mini_flux_has_an_estimate(name: str, tmp_path: Path):
    planned = plan(RECIPES[name](tmp_path / "study"), MACHINE, estimate)
    assert {each.estimate.unknown for each in planned} == {""}
    assert all(each.estimate.seconds and each.estimate.bytes for each in planned)


@pytest.mark.parametrize(
    ("name", "precision", "gpu"),
    [("flux_schnell", "bf16", 80), ("flux_schnell", "nf4", 24), pytest.param("flux_dev", "nf4", 24, marks=pytest.mark.slow)],
)
def test_the_recipes_of_flux_fit_the_gpus_that_people_have(
    name: str, precision: Precision, gpu: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    machine = Machine.with_gpu(product=775e12, bandwidth=3e12, memory=64 * 10**9, gpu=gpu * 10**9)
    planned = plan(RECIPES[name](tmp_path / "study", precision=precision), machine, estimate)
    with capsys.disabled():
        print(
            f"\n{name} in {precision} on {gpu} GB:\n" + "\n".join(row[:120] for row in plan_table(planned, machine).splitlines())
        )
    assert {each.estimate.unknown for each in planned} == {""}
    for status, cost in planned:
        assert cost.memory is not None and cost.memory.gpu is not None, status.record.verb
        assert cost.memory.gpu < gpu * 10**9 and cost.memory.host < machine.memory, status.record.verb
    assert most_on_disk(planned).bytes < 20 * 10**9


# What the commands took, one after another, on one core of the two with other work on both.
TOOK = {
    SteerEvalCommand: (540.9, {"dictionary": ("double.2/topk-2048-k32", "double.2/itda-2048-k32"), "trials": 12}),
    RemovalCommand: (
        1250.5,  # of processor time: it ran beside other work
        {
            "dictionary": ("double.2/topk-2048-k32,single.0/topk-2048-k32,single.1/topk-2048-k32",),
            "images": 16,
            "features": (1, 2, 4),
            "strength": (0.0, -1.0, -2.0, -4.0),
        },
    ),
    FindingsCommand: (486.7, {"site": "double.2"}),
}


def mini_flux_forecast(folder: Path, rate: float = 2e11) -> Forecast:
    """The forecast for a study of mini-flux with three stores and a dictionary for each."""
    shot = Shot(model="mini-flux", pixels=(64, 64), steps=4, guidance=3.5)
    sites = [Site(name) for name in ("double.2", "single.0", "single.1")]
    return Forecast(
        Machine.with_cpu(rate, MEMORY),
        stores={(folder, site): StoreForecast(1_000_000, 64, 192, shot) for site in sites},
        dictionaries={(folder, site): (DictionaryForecast(2048, 32, 192),) for site in sites},
    )


@pytest.mark.parametrize("verb", TOOK)
def test_measured_times_are_predicted_to_within_a_factor_of_two(
    verb: type[SteerEvalCommand | RemovalCommand | FindingsCommand], tmp_path: Path
):
    took, flags = TOOK[verb]
    planned = estimate(mini_flux_forecast(tmp_path), verb(study=tmp_path, **flags)).seconds
    assert planned is not None and took / 2 < planned < took * 2


@pytest.mark.parametrize(
    ("few", "many", "fixed"),
    [
        (
            SteerEvalCommand(study=Path("s"), trials=4, pairs=4),
            {"trials": 8, "pairs": 8},
            3 * SCALING,
        ),
        (
            RemovalCommand(study=Path("s"), images=6, selection_images=6, tuning_images=6),
            {"images": 12, "selection_images": 12, "tuning_images": 12},
            0.0,
        ),
        (
            FindingsCommand(study=Path("s"), site="double.2", trials=4, pairs=(20, 80)),
            {"trials": 8, "pairs": (40, 160)},
            SCALING,
        ),
    ],
    ids=lambda each: type(each).__name__,
)
def test_twice_the_images_take_twice_the_time(
    few: SteerEvalCommand | RemovalCommand | FindingsCommand, many: dict[str, int], fixed: float
):
    forecast = mini_flux_forecast(Path("s"))
    once, twice = (
        (estimate(forecast, each).seconds or 0) - (forecast.seconds(encoding=fixed) or 0) for each in (few, replace(few, **many))
    )
    assert once > 1 and twice == pytest.approx(2 * once)


def test_images_are_planned_with_the_settings_of_the_study_unless_flags_say_otherwise(tmp_path: Path):
    forecast, findings = mini_flux_forecast(tmp_path), FindingsCommand(study=tmp_path, site="double.2")
    stores = {key: store._replace(shot=replace(store.shot, steps=40)) for key, store in forecast.stores.items()}
    usual, longer, as_usual = (
        estimate(each, command).seconds or 0
        for each, command in (
            (forecast, findings),
            (replace(forecast, stores=stores), findings),
            (replace(forecast, stores=stores), replace(findings, steps=4)),
        )
    )
    assert longer > 3 * usual and as_usual == usual
    train = TrainCommand(study=tmp_path, site=("double.2",), tokens=10**6, live=True)
    half, same, large = (
        estimate(each, command)
        for each, command in (
            (forecast, replace(train, steps=2)),
            (replace(forecast, stores=stores), replace(train, steps=2)),
            (forecast, replace(train, steps=2, pixels=(256, 256))),
        )
    )
    assert same.seconds == half.seconds and large.memory and half.memory and large.memory.host > half.memory.host


def test_more_strengths_methods_and_dictionaries_take_more(tmp_path: Path):
    forecast = mini_flux_forecast(tmp_path)
    least = [
        SteerEvalCommand(study=tmp_path, dictionary=("double.2",), strength=(1.0,)),
        RemovalCommand(study=tmp_path, dictionary=("double.2",), features=(1,)),
        FindingsCommand(study=tmp_path, site="double.2", finding=("quality",)),
    ]
    more = [
        (replace(least[0], strength=(1.0, 2.0)), replace(least[0], dictionary=("double.2", "single.0"))),
        (replace(least[1], features=(1, 2)), replace(least[1], dictionary=("double.2,single.0",))),
        (replace(least[2], finding=("quality", "steps")), replace(least[2], concepts_per_group=3)),
    ]
    for one, others in zip(least, more, strict=True):
        assert all((estimate(forecast, other).seconds or 0) > (estimate(forecast, one).seconds or 0) for other in others)


def test_the_time_of_external_judges_and_of_missing_dictionaries_is_unknown(tmp_path: Path):
    forecast, nothing = mini_flux_forecast(tmp_path), Forecast(MACHINE)
    assert (
        "judge takes is not known"
        in estimate(forecast, SteerEvalCommand(study=tmp_path, concepts=tmp_path / "concepts.toml", clip="clip")).unknown
    )
    for command in (SteerEvalCommand(study=tmp_path), RemovalCommand(study=tmp_path), ReportCommand(study=tmp_path)):
        assert "dictionaries there will be is not known" in estimate(nothing, command).unknown
    assert "--site" in estimate(forecast, FindingsCommand(study=tmp_path)).unknown
    elsewhere = SteerEvalCommand(study=tmp_path, dictionary=("double.0/topk-2048-k32",))
    assert "not known" in estimate(forecast, elsewhere).unknown
    assert "not known" in estimate(nothing, FindingsCommand(study=tmp_path, site="double.2")).unknown


def test_a_report_takes_longer_with_more_dictionaries(tmp_path: Path):
    forecast, site = mini_flux_forecast(tmp_path), Site("double.2")
    more = replace(forecast, dictionaries={(tmp_path, site): (DictionaryForecast(512, 8, 192),) * 9})
    few, many = (estimate(each, ReportCommand(study=tmp_path)) for each in (forecast, more))
    assert few.seconds and many.seconds and many.seconds > few.seconds and (many.bytes or 0) > (few.bytes or 0)


def test_the_time_of_an_endpoint_is_unknown_and_more_features_take_longer(tmp_path: Path):
    forecast = Forecast(
        Machine.with_cpu(1.0, MEMORY),
        dictionaries={(tmp_path, Site("double.1")): (DictionaryForecast(16, 2, 8), DictionaryForecast(32, 2, 8))},
    )
    assert "not known" in estimate(forecast, ExplainCommand(studies=(tmp_path,), vlm="http://here/v1", model="seer")).unknown
    few, many = (estimate(forecast, ExplainCommand(studies=(tmp_path,), random_features=count)).seconds for count in (10, 1000))
    assert few is not None and many is not None and few < many


CARD = {"product": 775e12, "bandwidth": 3e12, "memory": 120 * 10**9}
"""An H100, as measured (shared/card)."""


def test_on_a_gpu_times_are_near_those_that_were_measured():
    machine = Machine.with_gpu(**CARD, gpu=80 * 10**9)
    forecast, folder = Forecast(machine), Path("s")
    shot = Shot(model="black-forest-labs/FLUX.1-schnell", pixels=(256, 256), steps=1, guidance=0.0)
    forecast.stores[folder, Site("double.18")] = StoreForecast(40_960_000, 256, 3072, shot)
    harvest = HarvestCommand(
        model=shot.model, site=("double.18",), prompts="captions", tokens=39_624 * 60, steps=1, pixels=(256, 256), out=folder
    )
    assert 45 < (estimate(forecast, harvest).seconds or 0) < 90  # 39,624 tokens/s, with few prompts to encode
    train = TrainCommand(study=folder, site=("double.18",), k=(64,), size=(65_536,), tokens=4096 * 1000)
    assert 7 < (estimate(forecast, train).seconds or 0) < 42  # the floor, and what it was


def test_memory_is_that_of_the_machine(tmp_path: Path):
    harvest = HarvestCommand(
        model="black-forest-labs/FLUX.1-schnell",
        site=("double.18",),
        prompts="captions",
        tokens=1024,
        pixels=(256, 256),
        out=tmp_path,
    )
    evaluate = EvaluateCommand(study=tmp_path, effect_shots=32)
    measured = {1: 31.6, 8: 31.9, 32: 33.0, 64: 34.3}  # GiB on an H100, by the batch
    for batch, peak in measured.items():
        forecast = Forecast(Machine.with_gpu(**CARD, gpu=80 * 10**9))
        memory = estimate(forecast, replace(harvest, batch=batch)).memory
        assert memory is not None and memory.gpu == pytest.approx(peak * 2**30, rel=0.15) and memory.gpu > peak * 2**30
    small = Forecast(Machine.with_gpu(**CARD, gpu=24 * 10**9))
    estimate(small, replace(harvest, precision="auto"))
    assert small.held[tmp_path] == ("nf4", False)
    middle = Forecast(Machine.with_gpu(**CARD, gpu=40 * 10**9))
    estimate(middle, replace(harvest, precision="auto"))  # the weights in bf16 fit, but nothing besides
    assert middle.held[tmp_path] == ("bf16", True)
    small.add(tmp_path, Site("double.18"), [DictionaryForecast(65_536, 64, 3072)])
    inherited, other = (estimate(small, replace(evaluate, precision=name)).memory for name in (None, "bf16"))
    assert inherited and other and inherited.gpu and other.gpu and inherited.gpu < 24e9 < other.gpu
    cpu = Forecast(MACHINE)
    need = estimate(cpu, harvest).memory
    assert need is not None and need.gpu is None and need.host > 4 * 16e9  # fp32


def test_the_table_shows_gpu_memory_where_there_is_a_gpu_and_what_does_not_fit(tmp_path: Path):
    harvest = HarvestCommand(
        model="black-forest-labs/FLUX.1-schnell",
        site=("double.18",),
        prompts="captions",
        tokens=1024,
        pixels=(256, 256),
        out=tmp_path,
    )
    study = Study(folder=tmp_path / "study", model=harvest.model, commands=(harvest,))
    for machine, texts in (
        (Machine.with_gpu(**CARD, gpu=24 * 10**9), ("GPU memory", "1: harvest needs", "of GPU memory, and 24 GB are free")),
        (MACHINE, ("1: harvest needs", "of memory, and 20 GB are free")),
        (replace(MACHINE, rates={}, gpu=80 * 10**9), ("GPU memory", "?")),
    ):
        table = plan_table(plan(study, machine, estimate), machine)
        assert all(text in table for text in texts) and ("GPU memory" in table) == (machine.gpu is not None)
        assert "Most on disk at once: " in table


def test_the_rate_of_the_machine_is_measured():
    assert 1e8 < machine_rate() < 1e16 and 1e8 < gather_rate(1 << 10) < 1e14
    here = this_machine()
    assert here.gpu is not None or set(here.rates) == set(MACHINE.rates)
    assert this_machine(10**9).gpu == 10**9


def test_durations_have_two_digits():
    assert [duration(seconds) for seconds in (2.34, 45.9, 130.0, 5400.0, 1e6)] == [
        "2.3 s",
        "46 s",
        "2.2 min",
        "1.5 h",
        "12 days",
    ]


def test_a_dry_run_shows_estimates_and_changes_nothing(
    study: Study, before: list[PlannedCommand], capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    (tmp_path / "mine.py").write_text(
        "from difflex.recipes import Study, TrainCommand\n"
        f"def study(folder):\n    train = TrainCommand(study=folder, site=('double.1',), k=(2,), size=(1024,), tokens=4000)\n"
        f"    return Study(folder=folder, model={study.model!r}, commands=(train,))\n"
    )
    files = sorted(path for path in study.folder.rglob("*"))
    assert main(["run", f"{tmp_path / 'mine.py'}:study", "--out", str(study.folder), "--dry-run"]) == 0
    table = capsys.readouterr().out
    assert "about" in table and "4,000" in table and "k=2 size=1024" in table and "total" in table
    assert sorted(path for path in study.folder.rglob("*")) == files
