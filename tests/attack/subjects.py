"""The commands under attack, each with the folder before and after an undisturbed run."""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .content import Content, content, content_hash, files, first_difference
from .process import Outcome, run

CHAIN = """
harvest   | harvest model --site double.1 double.1:neurons --prompts captions --tokens 640 --steps 1 --out study
verify    | verify study
train     | train study --site double.1 --size 16 --k 2,4 --tokens 512 --batch 64
itda      | itda study --site double.1 --size 8 --k 2 --tokens 512
neurons   | neurons study --site double.1:neurons --k 2
evaluate  | evaluate study --tokens 256 --effect-shots 2
anatomy   | anatomy model --prompts captions --max-prompts 4 --site double.1 --steps 1 --out study
concepts  | concepts study --dictionary double.1/topk-16-k2 --images 160 --noise 0.5
collect   | collect study --site double.1 --drawn-world --images 40 --noise 0.5 --top-examples 5 --random-examples 2 \
--silent-examples 2
explain   | explain study --random-features 3 --judged-images 4
paid      | explain study --dictionary double.1/topk-16-k2 --random-features 2 --judged-images 4 --vlm URL --model rule \
--price 1,1 --connections 2
contrast  | contrast study day --site double.1 --positive sun --negative moon
steer     | steer study 1 --dictionary double.1/topk-16-k2 --prompt star --strength 1 --out steered.png --record edit.json
replay    | steer study --replay edit.json --out again.png
along     | steer study --contrast day --prompt star --strength 1 --out along.png
icon      | icon study 1 --dictionary double.1/topk-16-k2 --strength 1 --out icon.png
steer-eval| steer-eval study --dictionary double.1/topk-16-k2 --groups size --min-ap 0 --trials 2 --pairs 2 --strength 1
removal   | removal study --dictionary double.1/topk-16-k2 --groups size --images 2 --selection-images 2 --tuning-images 2 \
--features 1 --strength 0
findings  | findings study --site double.1 --finding pairs --groups size --concepts-per-group 1 \
--trials 2 --pairs 1,2 --strength 0.5
features  | features study --dictionary double.1/topk-16-k2 --sort score
show      | show study 1 --dictionary double.1/topk-16-k2 --out sheet.png
run       | run recipe.py:study --out ran
status    | status ran
compare   | compare study ran --out compared.html
report    | report study
live      | train study --live --site double.0 --also double.1:text --size 16 --k 3 --tokens 512 --batch 64 --window 256
export    | export study double.1/topk-16-k2 --to saelens --out theirs
import    | import theirs --site double.1 --out study --label theirs
rows-out  | export-activations study --site double.1 --to npy --out rows
rows-in   | import-activations rows --out copy
vector-out| export-contrast study day --out day.gguf
vector-in | import-contrast study back day.gguf
push      | push study acme/day --dictionary double.1/topk-16-k2 --dry-run --out pushed
generate  | generate model star --steps 1 --out grid.png
sites     | sites model
models    | models
"""
"""A command a line, with a name; each finds what those before it made."""
RECIPE = """
from difflex.recipes import EvaluateCommand, HarvestCommand, ReportCommand, Study, TrainCommand


def study(folder):
    harvest = HarvestCommand(model="model", site=("double.1",), prompts="prompts.txt", steps=1, out=folder)
    train = TrainCommand(study=folder, site=("double.1",), k=(2,), size=(16,), tokens=512, batch=64)
    evaluate = EvaluateCommand(study=folder, tokens=128, effect_shots=0)
    return Study(folder=folder, model="model", commands=(harvest, train, evaluate, ReportCommand(study=folder)))
"""


class Subject(NamedTuple):
    """A command, and what it does where nothing disturbs it."""

    name: str
    """That of its line; with ", again" where its results exist already."""
    words: tuple[str, ...]
    before: Path
    """The folder in which it runs: model, study and all."""
    result: Path
    """What it made of a copy of that folder."""
    after: Content
    """The content of the result."""
    start: Content
    read: tuple[str, ...]
    """Files that it reads."""
    outcome: Outcome
    owned: tuple[str, ...]
    """Files that its first run made, which its next may change on request."""

    @property
    def verb(self) -> str:
        """The verb."""
        return self.words[0]

    @property
    def written(self) -> list[str]:
        """Files that it makes or changes."""
        return [path for path in self.after if self.after[path] != self.start.get(path)]


def make_subjects(folder: Path, url: str, names: Sequence[str] = ()) -> list[Subject]:
    """Run the chain in `folder`, or only the commands `names` of it, and return each command before and after its run."""
    stage, subjects = _first_stage(folder / "0"), []
    for number, line in enumerate(CHAIN.strip().splitlines(), 1):
        name, words = (part.strip() for part in line.split("|"))
        if names and name not in names:
            continue
        words = tuple(url if word == "URL" else word for word in words.split())
        following = folder / str(number)
        shutil.copytree(stage, following, symlinks=True)
        first = _observe(name, words, stage, following)
        first = first._replace(owned=tuple(first.written))
        subjects.append(first)
        if first.written:
            again = folder / f"{number}-again"
            shutil.copytree(following, again, symlinks=True)
            subjects.append(_observe(f"{name}-again", words, following, again)._replace(owned=first.owned))
        stage = following
    return subjects


def _first_stage(folder: Path) -> Path:
    from difflex.testing import tiny_folder

    folder.mkdir(parents=True)
    tiny_folder("flux", folder / "model", defaults={"pixels": [[64, 64], [32, 32]]})
    (folder / "recipe.py").write_text(RECIPE)
    (folder / "prompts.txt").write_text("".join(f"{name} {number}\n" for number in range(8) for name in ("sun", "moon", "star")))
    return folder


def _observe(name: str, words: tuple[str, ...], before: Path, folder: Path) -> Subject:
    """Run a command in `folder`, a copy of `before`, and note which files it reads, by their times of access."""
    start, read = content(before), []
    for path in files(folder):
        status = os.stat(folder / path)
        os.utime(folder / path, ns=(0, status.st_mtime_ns))
    outcome = run(words, folder)
    read = [path for path in start if (folder / path).is_file() and os.stat(folder / path).st_atime > 0]
    return Subject(name, words, before, folder, content(folder), start, tuple(read), outcome, ())


def differences(subjects: Sequence[Subject], others: Sequence[Subject]) -> Iterator[str]:
    """Yield what the same commands made differently in another folder, to the order of entries."""
    for one, other in zip(subjects, others, strict=True):
        for path in one.written:
            mine, its = one.result / path, other.result / path
            if content_hash(mine, exact=True) != content_hash(its, exact=True):
                yield f"{one.name}: {path} differs in another folder: {first_difference(mine, its)}"


def faults(subjects: Sequence[Subject]) -> Iterator[str]:
    """Yield what is wrong with undisturbed runs: an error, or a second run that changes something."""
    for subject in subjects:
        if subject.outcome.code:
            yield f"{subject.name}: {' '.join(subject.words)}: exit code {subject.outcome.code}\n{subject.outcome.error}"
        elif subject.name.endswith("-again") and subject.written:
            details = first_difference(subject.result / subject.written[0], subject.before / subject.written[0])
            yield f"{subject.name}: run a second time, it changes {', '.join(subject.written)}: {details}"
