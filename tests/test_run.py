"""Running a study: no command runs twice, a changed one runs again, and a kill costs only the command that was running."""

import json
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from difflex.errors import BadInput, BrokenFile, StaleWork, UnknownName
from difflex.files import folder_lock, read_json, write_json
from difflex.records import Site
from difflex.study import Command, DictionaryRef, Study, command_statuses, read_log, run_study


@dataclass(frozen=True, kw_only=True)
class Write(Command):
    """Writes a file; a file with other content is stale."""

    out: Path
    name: str
    text: str = "words"

    def __call__(self) -> list[Path]:
        path = self.out / self.name
        if path.exists() and path.read_text() != self.text:
            raise StaleWork(f"{path} holds something else.", path)
        path.write_text(self.text)
        return [path]


@dataclass(frozen=True, kw_only=True)
class Count(Command):
    """Counts how often it is called."""

    out: Path

    def __call__(self) -> list[Path]:
        path = self.out / "count"
        path.write_text(str(int(path.read_text()) + 1 if path.exists() else 1))
        return [path]


def planned(folder: Path, text: str = "words") -> Study:
    commands = (Write(out=folder, name="first", text=text), Count(out=folder), Write(out=folder, name="last"))
    return Study(folder=folder, model="mini-flux", commands=commands)


def run(study: Study, until: str | None = None) -> list[str]:
    lines: list[str] = []
    run_study(study, until=until, report=lines.append)
    return lines


def states(study: Study) -> list[str]:
    return [status.state for status in command_statuses(study)]


def test_every_command_runs_once(tmp_path: Path):
    assert states(planned(tmp_path)) == ["to do"] * 3
    assert [line.split(": ")[1] for line in run(planned(tmp_path))] == ["begins"] * 3
    assert states(planned(tmp_path)) == ["done"] * 3
    assert [line.split(": ")[1] for line in run(planned(tmp_path))] == ["done already"] * 3
    assert (tmp_path / "count").read_text() == "1"
    assert Study.open(tmp_path).model == "mini-flux"


def test_the_log_holds_the_date_and_the_time_of_each_command(tmp_path: Path):
    before = datetime.now(UTC) - timedelta(seconds=1)
    run(planned(tmp_path), until="count")
    records = read_log(tmp_path)
    assert all(record.seconds is not None and record.seconds >= 0 for record in records)
    assert all(before <= datetime.fromisoformat(record.finished or "") <= datetime.now(UTC) for record in records)
    run(planned(tmp_path), until="count")
    assert read_log(tmp_path) == records  # a command that is skipped keeps its date


def test_a_log_of_an_older_format_is_refused(tmp_path: Path):
    run(planned(tmp_path))
    entries = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**entries, "format": 1}))
    with pytest.raises(BrokenFile, match="format 1; this version of difflex reads format 2"):
        read_log(tmp_path)


def test_files_that_a_change_makes_stale_are_deleted_and_made_again(tmp_path: Path):
    run(planned(tmp_path))
    changed = planned(tmp_path, text="other words")
    assert states(changed) == ["changed", "done", "done"]
    lines = run(changed)
    assert "text 'words' -> 'other words'" in lines[0]
    assert "deleted and made again" in lines[1] and "holds something else" in lines[1]
    assert (tmp_path / "first").read_text() == "other words"
    # Later commands may depend on it and run again; each checks itself what is still valid.
    assert (tmp_path / "count").read_text() == "2"
    assert states(changed) == ["done"] * 3


@dataclass(frozen=True, kw_only=True)
class MakeDictionary(Command):
    """Makes a dictionary; one that was made from other data is stale."""

    out: Path
    data: str

    def __call__(self) -> list[Path]:
        folder = self.out / "dictionaries" / "double.1" / "topk-8-k1"
        if folder.exists() and (folder / "config.json").read_text() != self.data:
            raise StaleWork(f"{folder} was made from other data.", folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(self.data)
        return [folder]


def test_a_dictionary_that_the_recipe_did_not_make_is_moved_and_its_own_is_deleted(tmp_path: Path):
    MakeDictionary(out=tmp_path, data="by hand")()
    made = [Study(folder=tmp_path, model="x", commands=(MakeDictionary(out=tmp_path, data=data),)) for data in "ab"]
    lines = run(made[0])
    kept = tmp_path / "old-1" / "dictionaries" / "double.1" / "topk-8-k1"
    assert f"moved to {kept} and made again" in lines[-1] and (kept / "config.json").read_text() == "by hand"
    assert "deleted and made again" in run(made[1])[-1]
    MakeDictionary(out=tmp_path, data="b")()
    (tmp_path / "run.json").unlink()
    assert f"moved to {tmp_path / 'old-2'}" in run(made[0])[-1]
    assert Study.open(tmp_path).dictionaries() == [DictionaryRef(Site("double.1"), "topk-8-k1")]


@pytest.mark.parametrize("name", ["books/double.1/topk-8-k1.sqlite", "explanations/answers.sqlite"])
def test_what_was_paid_for_is_moved_and_never_deleted(name: str, tmp_path: Path):
    paid = tmp_path / name
    paid.parent.mkdir(parents=True)
    paid.write_text("paid")
    for number, place in enumerate((paid, paid.parent), 1):
        write = Write(out=paid.parent, name=paid.name)
        stale = Stale(path=place, write=write)
        run(Study(folder=tmp_path, model="x", commands=(stale,)))
        assert (tmp_path / f"old-{number}" / name).read_text() == ("paid" if number == 1 else "words")
        (tmp_path / "run.json").unlink()


@dataclass(frozen=True, kw_only=True)
class Stale(Command):
    """Finds `path` stale as long as it exists, then writes."""

    path: Path
    write: Write

    def __call__(self) -> list[Path]:
        if self.path.exists():
            raise StaleWork(f"{self.path} is stale.", self.path)
        self.path.parent.mkdir(exist_ok=True)
        self.write.out.mkdir(exist_ok=True)
        return self.write()


def test_a_new_command_at_the_end_reruns_none_before_it(tmp_path: Path):
    run(planned(tmp_path))
    study = planned(tmp_path)
    run(replace(study, commands=(*study.commands, Write(out=tmp_path, name="more"))))
    assert (tmp_path / "count").read_text() == "1" and (tmp_path / "more").exists()


def test_a_missing_output_is_made_again(tmp_path: Path):
    run(planned(tmp_path))
    (tmp_path / "first").unlink()
    assert states(planned(tmp_path)) == ["to do", "done", "done"]
    run(planned(tmp_path))
    assert (tmp_path / "first").exists()


def test_a_flag_that_a_command_got_after_it_ran_does_not_make_it_run_again(tmp_path: Path):
    run(planned(tmp_path))
    path = tmp_path / "run.json"
    entries = read_json(path, 2, "")
    for command in entries["commands"]:
        command["flags"].pop("text", None)
    write_json(path, 2, entries)
    assert states(planned(tmp_path)) == ["done"] * 3
    assert states(planned(tmp_path, text="others")) == ["changed", "done", "done"]


def test_until_stops_after_the_last_command_of_a_verb(tmp_path: Path):
    run(planned(tmp_path), until="count")
    assert states(planned(tmp_path)) == ["done", "done", "to do"]
    assert not (tmp_path / "last").exists()
    with pytest.raises(UnknownName, match="'cuont' is unknown; nearest: count"):
        run(planned(tmp_path), until="cuont")


def test_a_study_can_be_moved(tmp_path: Path):
    run(planned(tmp_path / "here"))
    (tmp_path / "here").rename(tmp_path / "there")
    assert states(planned(tmp_path / "there")) == ["done"] * 3


def test_a_study_can_be_moved_with_another_one_inside_it(tmp_path: Path):
    def outer(folder: Path) -> Study:
        (folder / "inner").mkdir(parents=True, exist_ok=True)
        return Study(folder=folder, model="mini-flux", commands=(Count(out=folder / "inner"),))

    run(outer(tmp_path / "here"))
    (tmp_path / "here").rename(tmp_path / "there")
    assert states(outer(tmp_path / "there")) == ["done"]


def test_a_failure_ends_the_run_and_the_next_one_continues_from_there(tmp_path: Path):
    (tmp_path / "elsewhere").write_text("others")
    study = planned(tmp_path / "study")
    blocked = Write(out=tmp_path, name="elsewhere")  # outside the study, so it is not deleted
    with pytest.raises(StaleWork):
        run(replace(study, commands=(study.commands[0], blocked, study.commands[1])))
    assert (tmp_path / "elsewhere").read_text() == "others"
    assert [record.seconds is None for record in read_log(tmp_path / "study")] == [False, True]
    assert run(study)[0].endswith("done already")


def test_two_processes_cannot_run_the_same_study(tmp_path: Path):
    with folder_lock(tmp_path, shared=False), pytest.raises(BadInput, match="Another process is writing"):
        run(planned(tmp_path))
    assert not (tmp_path / "first").exists()


@dataclass(frozen=True, kw_only=True)
class Begin(Command):
    """Begins the study as a harvest does, with the revision of the model that it has loaded."""

    out: Path

    def __call__(self) -> None:
        Study.begin(self.out, "OWNER/NAME", "abc")


def test_a_recipe_need_not_know_the_revision_that_a_harvest_finds(tmp_path: Path):
    study = Study(folder=tmp_path, model="OWNER/NAME", commands=(Begin(out=tmp_path), Count(out=tmp_path)))
    run(study)
    assert Study.open(tmp_path).revision == "abc"
    assert run(study)[0].endswith("done already")
    with pytest.raises(StaleWork, match="OWNER/NAME@abc, not OWNER/NAME@xyz"):
        run(replace(study, revision="xyz"))


def test_a_study_of_another_model_is_refused(tmp_path: Path):
    run(planned(tmp_path))
    with pytest.raises(StaleWork, match="studies mini-flux, not flux"):
        run(replace(planned(tmp_path), model="flux"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "damaged"),
        ('{"format": 9, "commands": []}', "format 9"),
        ("[]", "format None"),
        *(
            (f'{{"format": 2, "commands": {commands}}}', "damaged")
            for commands in (
                '[{"verb": "train", "flags": {}, "outputs": [], "finished": "noon"}]',
                '[{"verb": 3, "flags": {}, "outputs": []}]',
                '[{"verb": "train", "flags": [], "outputs": []}]',
                '[{"verb": "train", "flags": {}, "outputs": "words"}]',
                '[{"verb": "train", "flags": {}, "outputs": [3]}]',
                '[{"verb": "train", "flags": {}, "outputs": [], "seconds": NaN}]',
                '[{"verb": "train", "flags": {}, "outputs": [], "seconds": "9"}]',
                '[{"verb": "train", "flags": {}, "outputs": [], "seconds": 1e999}]',
                '[{"verb": "train", "flags": {}, "outputs": [], "colour": "red"}]',
                '{"verb": 1}',
                "7",
                100_000 * "[",
                10_000 * "9",
            )
        ),
    ],
)
def test_a_damaged_or_foreign_log_is_named_in_the_error(tmp_path: Path, text: str, complaint: str):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(BrokenFile, match=complaint):
        run(planned(tmp_path))


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_run import Count, Write, planned, run
from dataclasses import dataclass, replace
from difflex.study import Command

class Die(Write):
    def __call__(self):
        os.kill(os.getpid(), signal.SIGKILL)

study = planned(Path(sys.argv[1]))
run(replace(study, commands=(*study.commands[:2], Die(out=study.folder, name="last"))))
"""


def test_commands_that_were_done_before_a_kill_stay_done(tmp_path: Path):
    script = KILLED.format(tests=str(Path(__file__).parent))
    process = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert process.returncode == -signal.SIGKILL
    assert states(planned(tmp_path))[:2] == ["done", "done"]
    assert json.loads((tmp_path / "run.json").read_text())["commands"][-1]["seconds"] is None
    run(planned(tmp_path))
    assert (tmp_path / "count").read_text() == "1" and (tmp_path / "last").read_text() == "words"
