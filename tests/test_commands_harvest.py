"""`difflex harvest`: the activations of a real pipeline, stored, resumed and shared by processes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import difflex
from difflex.cli import main
from difflex.commands.features import CollectCommand
from difflex.commands.inputs import load_study_model
from difflex.files import folder_lock
from difflex.records import Site
from difflex.store import Store
from difflex.study import Study
from difflex.testing import tiny_folder

SITES = ["double.1", "single.*:update", "double.0:text"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder("flux", tmp_path_factory.mktemp("models") / "tiny-flux")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"star {i}" for i in range(12)) + "\n")
    return path


def harvest(model: Path, prompts: Path, out: Path, *flags: str) -> int:
    words = ["harvest", str(model), "--prompts", str(prompts), "--out", str(out), "--pixels", "16x24", "--batch", "4", *flags]
    return main(words if "--site" in flags else [*words, "--site", *SITES])


def contents(study: Path) -> dict[str, bytes]:
    return {str(path.relative_to(study)): path.read_bytes() for path in sorted(study.rglob("*")) if path.is_file()}


def test_a_row_can_be_made_again_from_its_shot(model: Path, prompts: Path, tmp_path: Path):
    assert harvest(model, prompts, tmp_path / "study", "--seeds", "3:5", "--steps", "2") == 0
    pipe = difflex.load(str(model))
    for site in (Site("double.1"), Site("single.2", "update"), Site("double.0", stream="text")):
        store = Store.open(tmp_path / "study" / "activations" / site.folder)
        assert store.complete
        [rows] = store.batches(10**6)
        assert len(set(rows.shots.tolist())) * store.tokens == len(rows.shots)
        for place in range(0, len(rows.shots), 97):
            shot = store.shot(int(rows.shots[place]))
            assert shot.seed in (3, 4) and shot.steps == 2 and shot.pixels == (16, 24)
            [again] = pipe.harvest([shot], [site], progress=False)
            torch.testing.assert_close(again.values[0][rows.tokens[place]].bfloat16(), rows.values[place], rtol=0.02, atol=0.01)


def test_every_prompt_seed_and_step_is_harvested_once(model: Path, prompts: Path, tmp_path: Path):
    for kept, every in [("1:3", ()), ("0:3:2", (0, 3, 2))]:
        folder = tmp_path / kept.replace(":", "-")
        assert harvest(model, prompts, folder, "--seeds", "3:5", "--steps", "3", "--keep-steps", kept) == 0
        store = Store.open(folder / "activations" / "double.1")
        shots = {store.shot(number) for number in range(12 * 2 * 2)}
        assert len({(shot.prompt, shot.seed, shot.timestep) for shot in shots}) == 12 * 2 * 2
        assert len({shot.timestep for shot in shots}) == 2
        assert Study.open(folder).settings.keep_steps == (every or (1, 3))


def test_the_same_command_again_adds_nothing_and_more_tokens_are_added(model: Path, prompts: Path, tmp_path: Path):
    assert harvest(model, prompts, tmp_path / "once") == 0
    assert harvest(model, prompts, tmp_path / "twice", "--tokens", "40") == 0
    assert harvest(model, prompts, tmp_path / "twice") == 0
    assert harvest(model, prompts, tmp_path / "twice") == 0
    assert contents(tmp_path / "twice") == contents(tmp_path / "once")


def test_each_prompt_has_a_seed_of_its_own_unless_seeds_are_given(model: Path, prompts: Path, tmp_path: Path, capsys):
    flags = ["--site", "double.0", "--keep-steps", "0:1"]
    assert harvest(model, prompts, tmp_path / "own", *flags) == 0
    store = Store.open(tmp_path / "own" / "activations" / "double.0")
    shots = [store.shot(number) for number in range(12)]
    assert [(shot.prompt, shot.seed) for shot in shots] == [(f"star {i}", i) for i in range(12)]
    assert Study.open(tmp_path / "own").settings.seeds is None
    assert harvest(model, prompts, tmp_path / "own", *flags) == 0  # up to date
    assert harvest(model, prompts, tmp_path / "own", *flags, "--seeds", "0:2") == 2
    assert "was begun with a seed for each prompt. Leave --seeds out" in capsys.readouterr().err
    assert harvest(model, prompts, tmp_path / "given", *flags, "--seeds", "0:1") == 0
    assert harvest(model, prompts, tmp_path / "given", *flags) == 2
    assert "Give them again with --seeds 0:1" in capsys.readouterr().err


def test_more_seeds_are_added_after_those_that_are_stored(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "steps"
    assert harvest(model, prompts, folder, "--seeds", "2:4") == 0
    before = Store.open(folder / "activations" / "double.1")
    stored = [before.shot(number) for number in range(before.count() // before.tokens)]
    assert harvest(model, prompts, folder, "--seeds", "2:5") == 0
    assert "The seeds 4:5 are added to 2:4" in capsys.readouterr().out
    with monkeypatch.context() as killed:
        killed.setattr("difflex.store.recorder.SiteRecorder.add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert harvest(model, prompts, folder, "--seeds", "2:7") == 130
    assert harvest(model, prompts, folder, "--seeds", "2:7") == 0
    after = Store.open(folder / "activations" / "double.1")
    shots = [after.shot(number) for number in range((after.count() + after.count("held-out")) // after.tokens)]
    assert shots[: len(stored)] == stored and {shot.seed for shot in shots} == {2, 3, 4, 5, 6}
    assert [shot.seed for shot in shots[2 * len(shots) // 5 :: len(shots) // 5]] == [4, 5, 6]
    assert harvest(model, prompts, tmp_path / "once", "--seeds", "2:4") == 0
    assert harvest(model, prompts, tmp_path / "once", "--seeds", "2:7") == 0
    assert contents(folder) == contents(tmp_path / "once")


@pytest.mark.filterwarnings("ignore:.*are longer than the 24 tokens")
@pytest.mark.parametrize(
    ("prompts_flag", "seeds", "message"),
    [
        (None, "1:3", "was begun with the seeds 0:2, not 1:3. Give them again, or add others after them, as in --seeds 0:4"),
        (None, "0:1", "was begun with the seeds 0:2, not 0:1"),
        ("captions", "0:3", "Seeds are added where the prompts are a file. Add --tokens instead"),
    ],
)
def test_seeds_that_cannot_be_added_are_refused_with_what_can(
    model: Path, prompts: Path, tmp_path: Path, prompts_flag: str, seeds: str, message: str, capsys: pytest.CaptureFixture[str]
):
    flags = ["--site", "double.0", "--tokens", "300"]
    assert harvest(model, Path(prompts_flag or prompts), tmp_path / "study", *flags, "--seeds", "0:2") == 0
    before = contents(tmp_path / "study")
    assert harvest(model, Path(prompts_flag or prompts), tmp_path / "study", *flags, "--seeds", seeds) == 2
    assert message in capsys.readouterr().err and contents(tmp_path / "study") == before


@pytest.mark.slow
def test_torchrun_shares_the_shots_and_yields_the_same_rows(model: Path, prompts: Path, tmp_path: Path):
    assert harvest(model, prompts, tmp_path / "one") == 0
    flags = ["--prompts", str(prompts), "--out", str(tmp_path / "two"), "--pixels", "16x24", "--batch", "4", "--site", *SITES]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "difflex"]
    subprocess.run([*torchrun, "harvest", str(model), *flags], check=True, capture_output=True)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_killed_harvest_continues_to_the_same_bytes(model: Path, tmp_path: Path):
    prompts = tmp_path / "many.txt"
    prompts.write_text("".join(f"star {i}\n" for i in range(400)))
    flags = ["--prompts", str(prompts), "--pixels", "16x24", "--batch", "4", "--site", *SITES]
    command = [sys.executable, "-m", "difflex", "harvest", str(model), *flags, "--out", str(tmp_path / "killed")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        begun = lambda: any(path.stat().st_size > 4096 for path in (tmp_path / "killed").rglob(".shard*.tmp"))  # noqa: E731
        while process.poll() is None and not begun():
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert list(tmp_path.rglob(".shard*.tmp")) and not list(tmp_path.rglob("shard*"))
    for name in ("killed", "whole"):
        assert main(["harvest", str(model), *flags, "--out", str(tmp_path / name)]) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_column_of_a_file_is_harvested(model: Path, tmp_path: Path):
    path = tmp_path / "prompts.csv"
    path.write_text("number,words\n0,a star\n1,a moon\n")
    assert harvest(model, path, tmp_path / "study", "--site", "double.0", "--steps", "1", "--prompts-column", "words") == 0
    store = Store.open(tmp_path / "study" / "activations" / "double.0")
    assert [store.shot(number).prompt for number in range(2)] == ["a star", "a moon"]


def test_a_shuffle_keeps_the_prompts_and_changes_their_order(model: Path, prompts: Path, tmp_path: Path):
    orders = []
    for flags in ([], ["--shuffle", "1"], ["--shuffle", "1"]):
        out = tmp_path / str(len(orders))
        assert harvest(model, prompts, out, "--site", "double.0", "--steps", "1", *flags) == 0
        store = Store.open(out / "activations" / "double.0")
        orders.append([store.shot(number).prompt for number in range(12)])
    assert orders[0] != orders[1] == orders[2]
    assert sorted(orders[0]) == sorted(orders[1])


@pytest.mark.filterwarnings("always:.*are truncated")  # the tiny model reads 24 tokens
def test_the_endless_captions_need_a_number_of_tokens(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert harvest(model, Path("captions"), tmp_path) == 2
    assert "--tokens" in capsys.readouterr().err
    assert harvest(model, Path("captions"), tmp_path, "--tokens", "100", "--site", "double.0") == 0


def test_changed_prompts_are_refused(model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert harvest(model, prompts, tmp_path / "study", "--site", "double.0") == 0
    before = contents(tmp_path / "study")
    prompts.write_text(prompts.read_text() + "one more\n")
    assert harvest(model, prompts, tmp_path / "study", "--site", "double.0") == 2
    assert "The prompts have changed" in capsys.readouterr().err
    assert contents(tmp_path / "study") == before


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"", "no prompt"), (b"\n \n", "no prompt"), (b"caf\xe9", "UTF-8"), (None, "does not exist")],
)
def test_a_file_without_usable_prompts_is_an_error(
    model: Path, tmp_path: Path, content: bytes | None, complaint: str, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    assert harvest(model, path, tmp_path / "study") == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(("size", "exit_code"), [("0.1kB", 2), ("1MB", 0)])
def test_the_limit_is_checked_before_anything_is_stored(
    model: Path, prompts: Path, tmp_path: Path, size: str, exit_code: int, capsys: pytest.CaptureFixture[str]
):
    assert harvest(model, prompts, tmp_path / "study", "--site", "double.0", "--max-bytes", size) == exit_code
    assert ("the limit is" in capsys.readouterr().err) == (exit_code == 2)
    assert (tmp_path / "study").exists() == (exit_code == 0)


def test_a_size_that_is_not_a_number_is_an_error(model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        harvest(model, prompts, tmp_path, "--max-bytes", "many")
    assert "100GB" in capsys.readouterr().err


def test_harvest_checks_that_it_can_write_before_it_loads_the_model(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    site = tmp_path / "study" / "activations" / "double.1"
    with folder_lock(site):
        assert harvest(Path("no/such/model"), prompts, tmp_path / "study", "--site", "double.*") == 2
        assert "Another process is writing" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert harvest(Path("no/such/model"), prompts, tmp_path / "file" / "study") == 2
    assert "file where a folder is needed" in capsys.readouterr().err


def test_a_file_in_the_place_of_a_store_is_an_error(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "study" / "activations").mkdir(parents=True)
    (tmp_path / "study" / "activations" / "double.1").write_text("")
    assert harvest(model, prompts, tmp_path / "study", "--site", "double.1") == 2
    assert "move it away" in capsys.readouterr().err


def test_the_text_length_is_a_setting_of_the_study_that_no_refused_harvest_changes(tmp_path: Path, capsys):
    (tmp_path / "prompts.txt").write_text("a red star\na blue ring\n")
    flags = ["--site", "double.0:text", "--prompts", str(tmp_path / "prompts.txt"), "--steps", "1", "--out", str(tmp_path / "s")]
    assert main(["harvest", "mini-flux", *flags, "--text-length", "20"]) == 0
    study, before = Study.open(tmp_path / "s"), (tmp_path / "s" / "study.json").read_bytes()
    assert (
        study.settings.text_length == 20 and Store.open(study.stores()[Site("double.0", stream="text")]).shot(0).text_length == 20
    )
    assert main(["harvest", "mini-flux", *flags]) == 2
    assert "was made from text_length 20, now it would be made from text_length None" in capsys.readouterr().err
    assert (tmp_path / "s" / "study.json").read_bytes() == before
    pipe = load_study_model(study, CollectCommand(study=study.folder))
    assert next(pipe.shots("a red star")).text_length == 20
