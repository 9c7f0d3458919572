"""`difflex train`, `itda` and `neurons`: from a harvested study to dictionaries in it."""

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from difflex.cli import main
from difflex.commands.training import GrowthBar, ItdaCommand, NeuronsCommand, TrainCommand
from difflex.dictionaries import ITDA, SAE, Dictionary, Neurons
from difflex.errors import BrokenFile, NonFinite, OutOfMemory, StaleWork
from difflex.evaluation import Evaluation
from difflex.files import folder_lock
from difflex.records import Site
from difflex.store import Store
from difflex.study import Study
from difflex.testing import tiny_folder
from difflex.training.itda import GrowthInterval, GrowthProgress, GrowthWork

SITE = Site("double.1")
UPDATE = Path("dictionaries") / "double.1+update"


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with about 1,000 rows of width 32 of a block, of its update and of its neurons."""
    folder = tmp_path_factory.mktemp("training")
    model = tiny_folder("flux", folder / "tiny-flux")
    (folder / "prompts.txt").write_text("\n".join(f"star {i} over {i * 7 % 13}" for i in range(60)))
    words = ["harvest", str(model), "--prompts", str(folder / "prompts.txt"), "--out", str(folder / "study"), "--steps", "2"]
    assert (
        main([*words, "--pixels", "16x24", "--batch", "8", "--site", *(f"{SITE}{part}" for part in ("", ":update", ":neurons"))])
        == 0
    )
    return folder / "study"


@pytest.fixture
def study(harvested: Path, tmp_path: Path) -> Path:
    """A study with activations and no dictionary."""
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "activations").symlink_to(harvested / "activations")
    (tmp_path / "study" / "study.json").write_bytes((harvested / "study.json").read_bytes())
    return tmp_path / "study"


FLAGS = {"--site": "double.1:update", "--k": "3,4", "--size": "64", "--batch": "64", "--tokens": "2000"}


def train(study: Path, *flags: str) -> int:
    words = [word for name, value in FLAGS.items() if name not in flags for word in (name, value)]
    return run("train", str(study), *words, *flags)


def run(*words: str) -> int:
    """Run a command and return its exit code, also that of a flag that is refused while it is parsed."""
    try:
        return main([*words])
    except SystemExit as error:
        return int(error.code or 0)


def test_a_dry_run_says_what_a_training_takes_and_trains_nothing(study: Path, capsys: pytest.CaptureFixture[str]):
    assert train(study, "--dry-run") == 0
    output = capsys.readouterr().out
    assert "to do" in output and "Most on disk at once" in output and "of this machine, with" in output
    assert not (study / "dictionaries").exists()


def snapshot(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """The content and the time of every file."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_every_size_is_trained_with_every_k(study: Path, capsys: pytest.CaptureFixture[str]):
    assert train(study, "--size", "64,96") == 0
    output = capsys.readouterr().out
    for label in ("topk-64-k3", "topk-64-k4", "topk-96-k3", "topk-96-k4"):
        dictionary = Dictionary.load(study / UPDATE / label)
        assert dictionary.name == f"double.1:update/{label}" and label in output
    before = snapshot(study)
    assert train(study, "--size", "64,96") == 0  # trained already: the same output again, and no file changes
    assert capsys.readouterr().out == output
    assert snapshot(study) == before


def test_flipped_bits_in_the_activations_are_named_before_anything_is_trained(
    harvested: Path, study: Path, capsys: pytest.CaptureFixture[str]
):
    (study / "activations").unlink()
    shutil.copytree(harvested / "activations", study / "activations")
    shard = next((study / "activations" / UPDATE.name).glob("shard-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = b"\x7e" * 64  # huge, but finite
    shard.write_bytes(content)
    assert train(study) == 2
    assert f"{shard.name} does not match its checksum" in capsys.readouterr().err
    assert not list(study.rglob("dictionary.safetensors")) and not list(study.rglob("state.safetensors"))


def test_nan_in_a_training_is_blamed_on_the_data_if_they_are_damaged(study: Path, monkeypatch: pytest.MonkeyPatch):
    def diverge(*words: object, **settings: object) -> None:
        raise NonFinite("Lower the learning rate.")

    def damaged(store: Store) -> None:
        raise BrokenFile("shard 3 is damaged")

    monkeypatch.setattr("difflex.training.sweeps.fit_tasks", diverge)
    command = TrainCommand(study=study, site=("double.1:update",))
    with pytest.raises(NonFinite, match="Lower the learning rate"):
        command()
    monkeypatch.setattr(Store, "verify", damaged)
    with pytest.raises(BrokenFile, match="shard 3"):
        command()


def test_two_commands_train_in_different_folders_only(study: Path, capsys: pytest.CaptureFixture[str]):
    with folder_lock(study / UPDATE / "topk-64-k3"):
        assert train(study) == 2
        assert "Another process is writing in" in capsys.readouterr().err
        assert train(study, "--k", "4") == 0
    assert train(study) == 0


def test_a_size_that_fits_no_memory_is_refused(study: Path):
    with pytest.raises(OutOfMemory, match=r"topk-1000000000-k32 .* GB of memory"):
        TrainCommand(study=study, site=("double.1:update",), size=(10**9,))()
    with pytest.raises(OutOfMemory, match=r"up to 1,000,000,000 atoms .* GB of memory"):
        ItdaCommand(study=study, site=(str(SITE),), k=4, threshold=(0.2,), size=(10**9,))()
    assert not (study / "dictionaries").exists()


@pytest.mark.parametrize("kind", ["batchtopk", "jumprelu", "matryoshka"])
@pytest.mark.parametrize("preset", ["default", "paper", "paper-auxk", "unbox"])
def test_every_preset_and_kind_has_its_own_label(study: Path, preset: str, kind: str):
    assert (
        train(study, "--preset", preset, "--kind", kind, "--learning-rate", "0.001", "--seed", "5", "--normalisation", "whiten")
        == 0
    )
    label = f"{kind}-64-k3{'' if preset == 'default' else f'-{preset}'}-whiten-lr0.001-seed5"
    config = json.loads((study / UPDATE / label / "config.json").read_text())["training"]["config"]
    assert (
        config["initialisation"]["seed"] == 5
        and config["optimiser"]["learning_rate"] == 0.001
        and config["normalisation"] == "whiten"
    )
    sae = Dictionary.load(study / UPDATE / label)
    assert isinstance(sae, SAE) and sae.label == label


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--site", "double.7"], "The site 'double.7' is unknown"),
        (["--tokens", "0"], "out of range"),
        (["--learning-rate", "-1"], "out of range"),
        (["--learning-rate", "nan"], "--learning-rate"),
        (["--k", "65"], "k 65 does not fit"),
    ],
)
def test_impossible_trainings_are_explained(study: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str):
    assert train(study, *flags) == 2
    assert words in capsys.readouterr().err


def test_a_list_of_numbers_may_have_commas_or_spaces(study: Path):
    assert train(study, "--k", "3,x") == 2
    assert train(study, "--k", "3", "4", "--seed", "9", "--size", "72") == 0
    assert (study / UPDATE / "topk-72-k4-seed9" / "config.json").exists()


def dictionaries(study: Path) -> list[ITDA]:
    loaded = [Dictionary.load(path.parent) for path in sorted((study / "dictionaries").glob("*/itda-*/dictionary.safetensors"))]
    return [itda for itda in loaded if isinstance(itda, ITDA)]


def test_every_threshold_grows_a_dictionary_with_its_label(study: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["itda", str(study), "--site", str(SITE), "--k", "4", "--threshold", "0.2", "0.4"]) == 0
    output = capsys.readouterr().out
    large, small = sorted(dictionaries(study), key=lambda itda: -itda.size)
    assert large.size > small.size
    for itda in (large, small):
        folder = Study.open(study).dictionary(SITE, itda.label)
        assert folder.is_dir() and f"{folder}: {itda.size:,} atoms" in output
    assert not list((study / "dictionaries").glob("*/growing-*"))


def test_smaller_sizes_are_the_first_atoms_of_the_largest(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["itda", str(study), "--site", str(SITE), "--k", "4", "--threshold", "0.1"]
    assert main([*words, "--size", "9,17,10000"]) == 0
    output, grown, before = capsys.readouterr().out, sorted(dictionaries(study), key=lambda itda: itda.size), snapshot(study)
    assert [itda.size for itda in grown[:2]] == [9, 17] and len(grown) == 3 and 17 < grown[2].size < 10_000
    assert {path.name for path in (study / "dictionaries" / SITE.folder).iterdir()} == {itda.label for itda in grown}
    assert main([*words, "--size", "9,17,10000"]) == 0
    assert main([*words, "--size", "17"]) == 0
    assert capsys.readouterr().out == output + "".join(line for line in output.splitlines(keepends=True) if "itda-17-" in line)
    assert snapshot(study) == before
    shutil.rmtree(study / "dictionaries")
    assert main([*words, "--size", "17"]) == 0
    [alone] = dictionaries(study)
    assert torch.equal(alone.atoms, grown[1].atoms) and torch.equal(alone.provenance.shots, grown[1].provenance.shots)
    assert alone.label == grown[1].label
    assert [line.split(":")[0] for line in output.splitlines()].count(str(Study.open(study).dictionary(SITE, alone.label))) == 1


def test_the_thresholds_of_several_sizes_are_searched_in_the_same_passes(study: Path):
    assert main(["itda", str(study), "--site", str(SITE), "--k", "4", "--size", "20,40"]) == 0
    together = {itda.label: itda.atoms for itda in dictionaries(study)}
    shutil.rmtree(study / "dictionaries")
    for size in ("20", "40"):
        assert main(["itda", str(study), "--site", str(SITE), "--k", "4", "--size", size]) == 0
    assert {itda.label for itda in dictionaries(study)} == set(together) == {"itda-20-k4", "itda-40-k4"}
    assert all(torch.equal(itda.atoms, together[itda.label]) for itda in dictionaries(study))


def test_an_atom_is_the_token_that_its_patch_names(study: Path):
    assert main(["itda", str(study), "--site", str(SITE), "--k", "4", "--size", "40"]) == 0
    [itda] = dictionaries(study)
    assert itda.size <= 40
    store = Store.open(study / "activations" / SITE.folder)
    [rows] = store.batches(10**6)
    patch = itda.patch(11)
    assert patch is not None and patch.shot == store.shot(patch.number)
    [row] = ((rows.shots == patch.number) & (rows.tokens == patch.token)).nonzero()[:, 0].tolist()
    z = itda.normalisation.apply(rows.values[row : row + 1])[0]
    torch.testing.assert_close(itda.atoms[11], z / z.norm(), atol=1e-5, rtol=0)


def test_a_repeated_command_grows_nothing_twice(study: Path, capsys: pytest.CaptureFixture[str]):
    words = ["itda", str(study), "--site", str(SITE), "--k", "4", "--threshold", "0.3"]
    assert main(words) == 0
    output, before = capsys.readouterr().out, snapshot(study)
    assert main(words) == 0
    assert capsys.readouterr().out == output
    assert snapshot(study) == before


def test_paper_sets_the_settings_of_the_paper_and_other_flags_override_them(study: Path):
    words = ["itda", str(study), "--site", str(SITE), "--preset", "paper"]
    assert main([*words, "--size", "50"]) == 0
    assert main([*words, "--k", "4", "--threshold", "0.3", "--pursuit", "matching"]) == 0
    mine, plain = sorted(dictionaries(study), key=lambda itda: itda.k)
    assert (plain.k, plain.pursuit, plain.normalisation.method) == (64, "gradient", "standardise")
    assert plain.origin.training["threshold"] == 0.6
    assert (plain.encode(torch.randn(9, plain.width)).values >= 0).all()
    assert (mine.k, mine.pursuit, mine.origin.training["threshold"]) == (4, "matching", 0.3)


def test_variants_of_one_size_have_different_labels(study: Path):
    words = ["itda", str(study), "--site", str(SITE), "--k", "4", "--size", "16", "--threshold", "0.1"]
    assert main([*words, "0.2", "0.3"]) == 0
    for more in (["--normalisation", "whiten"], ["--pursuit", "gradient"], ["--seed", "1"], ["--tokens", "300"]):
        assert main([*words, *more]) == 0
    assert main([*words[:-2]]) == 0
    grown = dictionaries(study)
    assert len(grown) == 8
    assert {itda.size for itda in grown if "over" in itda.label} == {16}
    assert {path.name for path in (study / "dictionaries" / "double.1").iterdir()} == {itda.label for itda in grown}


@pytest.mark.filterwarnings("default")
def test_a_taken_label_loses_no_growth(study: Path, capsys: pytest.CaptureFixture[str]):
    words = ["itda", str(study), "--site", str(SITE), "--k", "4", "--size", "16", "--threshold", "0.1", "0.2"]
    old = study / "dictionaries" / "double.1" / "itda-16-k4-over0.1"
    old.mkdir(parents=True)
    (old / "config.json").write_text("{")
    assert main(words) == 2
    errors = capsys.readouterr().err
    assert "Move the old one away" in errors and f"left as it is: {old / 'config.json'} is not JSON" in errors
    assert (old / "config.json").read_text() == "{"
    assert [itda.label for itda in dictionaries(study)] == ["itda-16-k4-over0.2"]
    [grown] = old.parent.glob("growing-*/dictionary.safetensors")
    stamp = grown.stat().st_mtime_ns
    old.rename(study / "old")
    assert main(words) == 0
    assert (old / grown.name).stat().st_mtime_ns == stamp
    assert {path.name for path in old.parent.iterdir()} == {"itda-16-k4-over0.1", "itda-16-k4-over0.2"}


def test_a_label_that_is_known_before_the_growth_and_taken_is_refused_at_once(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (study / "dictionaries" / "double.1" / "itda-40-k4").mkdir(parents=True)
    monkeypatch.delattr("difflex.training.study.grow")
    assert main(["itda", str(study), "--site", str(SITE), "--k", "4", "--size", "40"]) == 2
    assert "itda-40-k4 exists, with other data or settings. Move the old one away" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (["--site", "double.1"], "--threshold 0.3"),
        (["--site", "double.0", "--size", "10"], "The site 'double.0' is unknown; nearest: double.1"),
        (["--site", "double.1", "--threshold", "3"], "out of range"),
        (["--site", "double.1", "--size", "0"], "not a list of numbers above 0"),
        (["--site", "double.1", "--threshold", "0.3", "--tokens", "0"], "out of range"),
        (["--site", "double.1", "--threshold", "0.3", "--k", "0"], "out of range"),
    ],
)
def test_impossible_growths_are_explained(study: Path, flags: list, answer: str, capsys):
    assert run("itda", str(study), *flags) == 2
    assert answer in capsys.readouterr().err


def test_neurons_are_a_dictionary_like_any_other(study: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["neurons", str(study), "--site", "double.1:neurons", "--k", "8,128"]) == 0
    assert "128 neurons, 8 per token" in capsys.readouterr().out
    places = Study.open(study).dictionaries()
    assert [str(place) for place in places] == [
        "double.1:neurons/neurons-128-k8",
        "double.1:neurons/neurons-128-k128",
    ]
    assert main(["evaluate", str(study), "--effect-shots", "0"]) == 0
    few, all_of_them = (Evaluation.load(Study.open(study).evaluation(*place)) for place in places)
    assert few.overall.l0 <= 8 and (few.overall.model_space.fvu or 0) > 0
    assert all_of_them.overall.model_space.fvu == 0


def test_a_repeated_command_keeps_the_neurons(study: Path):
    command = NeuronsCommand(study=study, site=("double.1:neurons",), k=(4,))
    (folder,) = command()
    before = snapshot(study)
    assert command() == [folder] and snapshot(study) == before


def test_neurons_of_another_model_are_an_error(study: Path):
    command = NeuronsCommand(study=study, site=("double.1:neurons",), k=(5,))
    (folder,) = command()
    neurons = Dictionary.load(folder)
    Neurons(width=neurons.width, k=5, origin=replace(neurons.origin, model="other-flux")).save(folder)
    with pytest.raises(StaleWork, match=r"of another model\. Move it away") as raised:
        command()
    assert raised.value.path == folder


@pytest.mark.parametrize(
    ("site", "words"), [("double.0:neurons", "Harvest it first"), ("double.1", "has no neurons"), ("", "--site")]
)
def test_sites_without_neurons_are_explained(study: Path, site: str, words: str, capsys: pytest.CaptureFixture[str]):
    assert main(["neurons", str(study), "--site", *([site] if site else [])]) == 2
    assert words in capsys.readouterr().err


LIVE = ("--live", "--window", "512", "--harvest-batch", "8")


@pytest.mark.filterwarnings("default:.*is finished, with weights in bf16:UserWarning")
def test_live_training_harvests_with_the_settings_of_the_study(harvested: Path, study: Path, capsys: pytest.CaptureFixture[str]):
    assert train(study, *LIVE, "--also", "single.0", "--k", "3,4", "--weights", "bf16") == 0
    output, before = capsys.readouterr().out, snapshot(study)
    for name in ("double.1+update/topk-64-k3", "double.1+update/topk-64-k4", "single.0/topk-64-k4"):
        assert f"{study / 'dictionaries' / name}: 2,0" in output
        training = json.loads((study / "dictionaries" / name / "config.json").read_text())["training"]
        assert "16x24 pixels, 2 steps" in training["data"] and "window 512" in training["data"]
    assert not list(study.rglob("state.safetensors"))
    assert train(study, *LIVE, "--also", "single.0", "--k", "3,4", "--weights", "bf16") == 0
    assert capsys.readouterr().out == output and snapshot(study) == before
    assert train(study, *LIVE, "--k", "3") == 0 and snapshot(study) == before
    assert "topk-64-k3 is finished, with weights in bf16: --weights fp32 changes nothing" in capsys.readouterr().err
    assert train(study, "--live", "--window", "1024") == 2
    assert "other data: window 512, not window 1024." in capsys.readouterr().err


def test_live_and_stored_training_find_dictionaries_alike(study: Path, tmp_path: Path):
    assert train(study, "--k", "4", "--preset", "paper", *LIVE, "--checkpoints", "exact") == 0
    live = Dictionary.load(study / UPDATE / "topk-64-k4-paper")
    (study / UPDATE).rename(tmp_path / "live")
    assert train(study, "--k", "4", "--preset", "paper") == 0
    stored = Dictionary.load(study / UPDATE / "topk-64-k4-paper")
    fvu = [dictionary.origin.training["metrics"]["fvu"] for dictionary in (live, stored)]  # pyright: ignore
    assert fvu[0] == pytest.approx(fvu[1], rel=0.25)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--window", "512"], "--window needs --live"),
        (["--harvest-batch", "8"], "--harvest-batch needs --live"),
        (["--pixels", "16", "--steps", "3"], "--pixels, --steps needs --live"),
        (["--guidance", "0"], "--guidance needs --live"),
        (["--live", "--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--live", "--prompts-column", "text"], "--prompts-column needs --prompts"),
        (["--live", "--also", "double.77"], "double.77"),
        (["--live", "--prompts", "captions"], "endless: say how many --tokens"),
    ],
)
def test_impossible_live_trainings_are_explained(study: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str):
    without_tokens = {"--tokens"} if "captions" in flags else set()
    given = [word for name, value in FLAGS.items() if name not in without_tokens for word in (name, value)]
    assert run("train", str(study), *given, *flags) == 2
    assert words in capsys.readouterr().err
    assert not list(study.rglob("state.safetensors"))


def test_a_growth_at_several_sites_is_shown_in_percent_of_all_of_it(monkeypatch: pytest.MonkeyPatch):
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    monkeypatch.setattr("difflex.progress.EVERY", 1e-9)
    monkeypatch.setattr("difflex.commands.training.EVERY", 0.0)
    with GrowthBar(3) as bar:
        bar.end_site()  # nothing to grow there
        for share in (0.2, 0.6):
            work = lambda share=share: GrowthWork(share, 1 - share)  # noqa: E731
            bar.show(GrowthProgress(0.3, 1, GrowthInterval(500, 9, 40), work))
        bar.end_site()
        bar.show(GrowthProgress(0.25, 0, GrowthInterval(500, 9, 60), lambda: GrowthWork(1, 1)))
    shown = re.findall(r"growing: (\S+) of 100% in .* to go, .*", log.getvalue())
    assert shown[-3:] == ["30.0", "75.0", "100"] and "pass 2, threshold 0.3, 40 atoms" in log.getvalue()
