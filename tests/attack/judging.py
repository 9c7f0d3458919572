"""Run one case and say what went wrong: tracebacks, hangs, losses, unclear sentences."""

import random
import re
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from . import states
from .cases import INPUTS, Case
from .content import Content, content, first_difference, leftovers, paid_rows
from .process import Conditions, ForkedCommand, Outcome, run
from .states import Mounts

LETTERS = 400
"""The longest sentence, without the names of files in it."""
ANSWERS = "study/explanations/answers.sqlite"
"""What the command repairs itself; the old file put back would lack the new answers."""
PRECIOUS = ("books/", "explanations/", "dictionaries/", "steering/contrasts/")
"""What cannot be made again for nothing: nobody is told to delete it."""
PARTIAL = re.compile(
    r"/training/|/growing-|run\.json$|\.partial|/activations/|/images/|answers\.sqlite$|scores\.json$|books/|log\.jsonl$"
)
"""Files that a command may leave half done; that it continues from them is tested after the repair."""
SIDE_EFFECTS = re.compile(r"study\.json$|/statistics\.safetensors$|/steering/scales/")
"""Files that several commands make when they are missing."""

Kind = Literal["traceback", "hang", "loss", "unclear"]


class Problem(NamedTuple):
    """What went wrong in a case."""

    kind: Kind
    text: str


class CaseReport(NamedTuple):
    """The result of a case."""

    code: int
    sentence: str
    problems: list[Problem]
    seconds: float


class Bench:
    """Where cases are run, one after another."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed = folder, seed
        self.mounts = Mounts()

    def run(self, case: Case) -> CaseReport:
        """Run a case in a folder of its own."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        small = case.free is not None and self.mounts.allowed
        try:
            if small:
                self.mounts.small(folder)
            states.copy(case.subject.before, folder)
            return self._run(case, folder)
        except Exception:
            return CaseReport(1, "", [Problem("traceback", f"of the attack itself: {traceback.format_exc()[-900:]}")], 0.0)
        finally:
            if small:
                self.mounts.unmount(folder)
            states.restore(folder, folder, None)
            shutil.rmtree(folder)

    def _run(self, case: Case, folder: Path) -> CaseReport:
        if case.group == "twice":
            return _run_twice(case, folder, self._rng(case))
        if case.damage is not None and case.place is not None:
            case.damage(folder / case.place, self._rng(case))
        if case.renamed is not None:
            _rename_study(folder, case.renamed)
        before, paid = content(folder), paid_rows(folder)
        conditions = self._disturb(case, folder)
        outcome = run(case.words, folder, conditions, case.plain)
        problems = [*_ending(case, outcome)]
        self._calm(case, folder)
        after = content(folder)
        problems += _losses(case, folder, before, after, outcome)
        problems += [Problem("loss", f"gone from {table}: {rows}") for table, rows in _vanished(paid, folder, before).items()]
        changed = after not in (before, case.subject.after) or (outcome.code < 0 and after != case.subject.after)
        repaired = outcome.code == 0 and (case.altered or case.place == ANSWERS)
        if changed and case.own and not repaired:
            states.restore(case.subject.before, folder, case.place)
            again = run(case.words, folder)
            problems += _after_repair(case, folder, again)
        if remaining := leftovers(folder):
            problems.append(Problem("loss", f"left behind: {', '.join(remaining[:3])}"))
        return CaseReport(outcome.code, _sentence(outcome), problems, outcome.seconds)

    def _rng(self, case: Case) -> random.Random:
        return random.Random(f"{self._seed} {case.name}")

    def _disturb(self, case: Case, folder: Path) -> Conditions:
        """Make the disk full or read-only, as far as this machine permits."""
        if case.free is not None:
            if not self.mounts.allowed:
                return case.conditions._replace(file_limit=case.free // 8)
            self.mounts.leave_free(folder, case.free)
        if case.read_only:
            if not self.mounts.allowed:
                states.locked_study(folder / "study" / "study.json", self._rng(case))
                return case.conditions._replace(powerless=True)
            self.mounts.read_only(folder, True)
        return case.conditions

    def _calm(self, case: Case, folder: Path) -> None:
        """Free the disk again, and give back the permissions."""
        if case.free is not None and self.mounts.allowed:
            self.mounts.leave_free(folder, None)
        if case.read_only and self.mounts.allowed:
            self.mounts.read_only(folder, False)
            self.mounts.unmount(folder)
        states.restore(folder, folder, None)


def _rename_study(folder: Path, name: str) -> None:
    try:
        if not (folder / name).exists() and (folder / "study").exists():
            (folder / "study").rename(folder / name)
    except OSError:
        return  # no disk allows this name; a command may be given it all the same


def _run_twice(case: Case, folder: Path, rng: random.Random) -> CaseReport:
    """Run the command in two processes at the same time; the second starts a moment later."""
    paid, before = paid_rows(folder), content(folder)
    first = ForkedCommand(case.words, folder)
    time.sleep(rng.uniform(0, case.subject.outcome.seconds / 2))
    second = run(case.words, folder)
    outcomes = [first.end(), second]
    problems = [problem for outcome in outcomes for problem in _ending(case, outcome)]
    if all(outcome.code for outcome in outcomes):
        problems.append(Problem("loss", "neither of two at once ended well"))
    problems += _differences(folder, case, "after two at once")
    problems += [Problem("loss", f"gone from {table}: {rows}") for table, rows in _vanished(paid, folder, before).items()]
    problems += [Problem("loss", f"left behind: {path}") for path in leftovers(folder)]
    worst = max(outcomes, key=lambda outcome: outcome.code)
    return CaseReport(worst.code, _sentence(worst), problems, worst.seconds)


def _sentence(outcome: Outcome) -> str:
    lines = [line for line in outcome.error.splitlines() if line.startswith("difflex: ") and "difflex: warning" not in line]
    return lines[-1] if lines else ""


def _ending(case: Case, outcome: Outcome) -> Iterator[Problem]:
    """Yield what is wrong with exit code and sentence."""
    killed = case.conditions.kill is not None or case.conditions.kill_after is not None
    if outcome.hung:
        yield Problem("hang", f"still running after {outcome.seconds:.0f} s")
    elif "Traceback" in outcome.error or (outcome.code not in (0, 2, 130) and not (killed and outcome.code == -9)):
        yield Problem("traceback", f"exit code {outcome.code}: {outcome.error.strip()[-700:]}")
    elif outcome.code not in (*case.codes, -9):
        yield Problem("unclear", f"exit code {outcome.code}, expected {case.codes}: {_sentence(outcome)}")
    if outcome.code == 2 and not outcome.hung:
        yield from _wording(case, outcome)


def _wording(case: Case, outcome: Outcome) -> Iterator[Problem]:
    sentence = _sentence(outcome)
    if not sentence:  # tyro's box
        if not re.search(r"error|unrecognized|required|invalid|missing", outcome.error, re.IGNORECASE):
            yield Problem("unclear", f"exit code 2 without a sentence: {outcome.error[-300:]!r}")
        return
    short = re.sub(r"\S*/\S*|x{20,}", "", sentence)
    if len(short) > LETTERS:
        yield Problem("unclear", f"{len(short)} letters: {sentence}")
    if case.names and not any(name in sentence + outcome.output for name in case.names):
        yield Problem("unclear", f"names none of {', '.join(case.names)}: {sentence}")
    place = case.place or ""
    if any(part in place for part in PRECIOUS) and re.search(r"\b[Dd]elete (it|them|the)\b", sentence):
        yield Problem("loss", f"says to delete what cannot be made again: {sentence}")


def _losses(case: Case, folder: Path, before: Content, after: Content, outcome: Outcome) -> Iterator[Problem]:
    """Yield files that changed to something that an undisturbed run would not have made."""
    result, own = case.subject.after, set(case.subject.written)
    text = outcome.output + outcome.error
    noticed = any(name in text for name in case.names)
    for path in sorted(before.keys() | after.keys()):
        if after.get(path) in (before.get(path), result.get(path, "")) or path.endswith(".tmp"):
            continue
        if not case.own:
            usual = path if case.renamed is None else path.replace(case.renamed, "study", 1)
            permitted = path not in before or usual in case.subject.owned or bool(SIDE_EFFECTS.search(path))
        elif outcome.code:
            permitted = (
                _renewed(case, path)
                or bool(PARTIAL.search(path))
                or (path not in before and (path in own or _moved(path, before, after)))
            )
        else:
            permitted = not case.exact or path == case.place or noticed or bool(SIDE_EFFECTS.search(path))
        if not permitted:
            change = "new" if path not in before else "gone" if path not in after else "changed"
            detail = first_difference(folder / path, case.subject.result / path)
            yield Problem("loss", f"exit code {outcome.code}, {change}: {path} {detail}; {_sentence(outcome)}")
            return


def _renewed(case: Case, path: str) -> bool:
    """Return whether `difflex run` may delete a file, to make it again for other prompts or another recipe."""
    return case.subject.verb == "run" and path in case.subject.owned and case.place in INPUTS


def _moved(path: str, before: Content, after: Content) -> bool:
    """Return whether a new file is an old one under another name."""
    return after[path] in before.values()


def _vanished(paid: dict[str, Counter[str]], folder: Path, before: Content) -> dict[str, str]:
    """Return rows that cost money and are no longer there, in any file."""
    now = paid_rows(folder)
    gone = {}
    for place, rows in paid.items():
        table = place.split(" ")[1]
        lost = rows - now.get(place, Counter())
        elsewhere = [found for name, found in now.items() if name.endswith(f" {table}") and name.split(" ")[0] not in before]
        for found in elsewhere:
            lost -= found
        if lost:
            gone[place] = str(list(lost)[:2])[:300]
    return gone


def _after_repair(case: Case, folder: Path, outcome: Outcome) -> Iterator[Problem]:
    if outcome.hung:
        yield Problem("hang", "after the repair")
    elif outcome.code:
        kind = "traceback" if "Traceback" in outcome.error else "loss"
        yield Problem(kind, f"after the repair, the same command ends with {outcome.code}: {outcome.error.strip()[-500:]}")
    else:
        yield from _differences(folder, case, "after the repair")


def _differences(folder: Path, case: Case, when: str) -> Iterator[Problem]:
    """Yield where the folder is not what an undisturbed run leads to."""
    actual, expected = content(folder), case.subject.after
    differing = sorted(path for path in actual.keys() | expected.keys() if actual.get(path) != expected.get(path))
    kept = [path for path in differing if states.KEPT not in path and not (path not in expected and ".sqlite" in path)]
    if kept:
        detail = first_difference(folder / kept[0], case.subject.result / kept[0])
        yield Problem("loss", f"{when}, the result differs: {', '.join(kept[:3])} {detail}")
