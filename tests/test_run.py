"""Running a study: nothing twice, what a change has made useless once more, and a kill costs only what was under way."""

import json
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from difflex.errors import BadInput, BrokenFile, StaleWork, UnknownName
from difflex.files import folder_lock
from difflex.study import Command, Study, diary, run_study, steps


@dataclass(frozen=True, kw_only=True)
class Write(Command):
    """Writes a file; one that says something else stands in the way."""

    out: Path
    name: str
    text: str = "words"

    def __call__(self) -> list[Path]:
        path = self.out / self.name
        if path.exists() and path.read_text() != self.text:
            raise StaleWork(f"{path} says something else.", path)
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


def study(folder: Path, text: str = "words") -> Study:
    commands = (Write(out=folder, name="first", text=text), Count(out=folder), Write(out=folder, name="last"))
    return Study(folder=folder, model="mini-flux", commands=commands)


def run(asked: Study, until: str | None = None) -> list[str]:
    told: list[str] = []
    run_study(asked, until=until, tell=told.append)
    return told


def states(asked: Study) -> list[str]:
    return [step.state for step in steps(asked)]


def test_every_command_is_done_once(tmp_path: Path):
    assert states(study(tmp_path)) == ["to do"] * 3
    assert [line.split(": ")[1] for line in run(study(tmp_path))] == ["begins"] * 3
    assert states(study(tmp_path)) == ["done"] * 3
    assert [line.split(": ")[1] for line in run(study(tmp_path))] == ["done already"] * 3
    assert (tmp_path / "count").read_text() == "1"
    assert Study.open(tmp_path).model == "mini-flux"


def test_the_diary_says_when_each_command_was_done_and_what_it_took(tmp_path: Path):
    before = datetime.now(UTC) - timedelta(seconds=1)
    run(study(tmp_path), until="count")
    entries = diary(tmp_path)
    assert all(entry.seconds is not None and entry.seconds >= 0 for entry in entries)
    assert all(before <= datetime.fromisoformat(entry.done or "") <= datetime.now(UTC) for entry in entries)
    run(study(tmp_path), until="count")
    assert diary(tmp_path) == entries  # what is done already keeps its date


def test_a_diary_from_before_there_were_dates_is_read_and_nothing_done_again(tmp_path: Path):
    run(study(tmp_path))
    said = json.loads((tmp_path / "run.json").read_text())
    for command in said["commands"]:
        del command["done"]
    (tmp_path / "run.json").write_text(json.dumps(said))
    assert states(study(tmp_path)) == ["done"] * 3 and diary(tmp_path)[0].done is None


def test_what_a_change_makes_useless_is_removed_and_made_again_and_said(tmp_path: Path):
    run(study(tmp_path))
    changed = study(tmp_path, text="other words")
    assert states(changed) == ["changed", "done", "done"]
    told = run(changed)
    assert "text 'words' -> 'other words'" in told[0]
    assert "removed and made anew" in told[1] and "says something else" in told[1]
    assert (tmp_path / "first").read_text() == "other words"
    # What comes after may rest on it, and is asked again; it knows itself what still holds.
    assert (tmp_path / "count").read_text() == "2"
    assert states(changed) == ["done"] * 3


def test_a_change_at_the_end_touches_nothing_before_it(tmp_path: Path):
    run(study(tmp_path))
    asked = study(tmp_path)
    run(replace(asked, commands=(*asked.commands, Write(out=tmp_path, name="more"))))
    assert (tmp_path / "count").read_text() == "1" and (tmp_path / "more").exists()


def test_what_was_made_and_is_gone_is_made_again(tmp_path: Path):
    run(study(tmp_path))
    (tmp_path / "first").unlink()
    assert states(study(tmp_path)) == ["to do", "done", "done"]
    run(study(tmp_path))
    assert (tmp_path / "first").exists()


def test_until_stops_after_the_last_command_of_a_verb(tmp_path: Path):
    run(study(tmp_path), until="count")
    assert states(study(tmp_path)) == ["done", "done", "to do"]
    assert not (tmp_path / "last").exists()
    with pytest.raises(UnknownName, match="'cuont' is unknown; nearest: count"):
        run(study(tmp_path), until="cuont")


def test_a_study_may_be_moved(tmp_path: Path):
    run(study(tmp_path / "here"))
    (tmp_path / "here").rename(tmp_path / "there")
    assert states(study(tmp_path / "there")) == ["done"] * 3


def test_a_study_may_be_moved_with_another_one_inside_it(tmp_path: Path):
    def asked(folder: Path) -> Study:
        (folder / "inner").mkdir(parents=True, exist_ok=True)
        return Study(folder=folder, model="mini-flux", commands=(Count(out=folder / "inner"),))

    run(asked(tmp_path / "here"))
    (tmp_path / "here").rename(tmp_path / "there")
    assert states(asked(tmp_path / "there")) == ["done"]


def test_a_failure_stops_and_the_next_run_goes_on_from_there(tmp_path: Path):
    (tmp_path / "elsewhere").write_text("others")
    asked = study(tmp_path / "study")
    blocked = Write(out=tmp_path, name="elsewhere")  # not in the study: it is not ours to remove
    with pytest.raises(StaleWork):
        run(replace(asked, commands=(asked.commands[0], blocked, asked.commands[1])))
    assert (tmp_path / "elsewhere").read_text() == "others"
    assert [entry.seconds is None for entry in diary(tmp_path / "study")] == [False, True]
    assert run(asked)[0].endswith("done already")


def test_two_processes_do_not_run_the_same_study(tmp_path: Path):
    with folder_lock(tmp_path, shared=False), pytest.raises(BadInput, match="Another process is writing"):
        run(study(tmp_path))
    assert not (tmp_path / "first").exists()


@dataclass(frozen=True, kw_only=True)
class Begin(Command):
    """Begins the study, as a harvest does, which knows the revision of the model that it has loaded."""

    out: Path

    def __call__(self) -> None:
        Study.begin(self.out, "OWNER/NAME", "abc")


def test_a_recipe_need_not_know_the_revision_that_a_harvest_finds(tmp_path: Path):
    asked = Study(folder=tmp_path, model="OWNER/NAME", commands=(Begin(out=tmp_path), Count(out=tmp_path)))
    run(asked)
    assert Study.open(tmp_path).revision == "abc"
    assert run(asked)[0].endswith("done already")
    with pytest.raises(StaleWork, match="OWNER/NAME@abc, asked is OWNER/NAME@xyz"):
        run(replace(asked, revision="xyz"))


def test_a_study_of_another_model_is_refused(tmp_path: Path):
    run(study(tmp_path))
    with pytest.raises(StaleWork, match="studies mini-flux, asked is flux"):
        run(replace(study(tmp_path), model="flux"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "damaged"),
        ('{"format": 9, "commands": []}', "format 9"),
        ("[]", "damaged"),
        ('{"format": 1, "commands": [{"verb": "train", "flags": {}, "made": [], "done": "noon"}]}', "damaged"),
    ],
)
def test_a_diary_that_is_not_ours_is_named(tmp_path: Path, text: str, complaint: str):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(BrokenFile, match=complaint):
        run(study(tmp_path))


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_run import Count, Write, run, study
from dataclasses import dataclass, replace
from difflex.study import Command

class Die(Write):
    def __call__(self):
        os.kill(os.getpid(), signal.SIGKILL)

asked = study(Path(sys.argv[1]))
run(replace(asked, commands=(*asked.commands[:2], Die(out=asked.folder, name="last"))))
"""


def test_after_a_kill_what_was_done_stays_done(tmp_path: Path):
    script = KILLED.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert states(study(tmp_path))[:2] == ["done", "done"]
    assert [entry["seconds"] is None for entry in json.loads((tmp_path / "run.json").read_text())["commands"]][-1]
    run(study(tmp_path))
    assert (tmp_path / "count").read_text() == "1" and (tmp_path / "last").read_text() == "words"
