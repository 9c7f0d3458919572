"""Damaged files of other tools: a dictionary or a sentence, never a traceback, a hang or much memory."""

import random
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from damage import mutated
from interchange_cases import FROZEN, SITE, SIZE, WIDTH, K, cases, fae_file, note, our_itda, our_sae, rand

from difflex.dictionaries import Normalisation
from difflex.errors import DifflexError
from difflex.interchange import FORMATS, read_code_statistics, read_dictionary, write_dictionary

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK, MANY = 30, 2000
MEMORY, SECONDS = 300, 10.0
"""MB that the process may grow by, and how long a file may take."""
NAMES = [format.name for format in FORMATS]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Undamaged dictionaries of every format."""
    root = tmp_path_factory.mktemp("whole")
    for folder in cases(FROZEN):
        shutil.copytree(
            folder, root / note(folder)["format"] / folder.name, ignore=shutil.ignore_patterns("case.json", "computed*")
        )
    for name in ("sdxl-unbox", "saeuron"):
        write_dictionary(our_sae(), name, root / name / "topk")
    torch.save(rand(SIZE).abs(), root / "sdxl-unbox" / "topk" / "mean.pt")
    write_dictionary(our_itda("matching", Normalisation.identity(WIDTH)), "itda", root / "itda" / "itda")
    write_dictionary(our_itda("gradient"), "itda-flux", root / "itda-flux" / "itda")
    fae_file(root / "fae" / "fae")
    return root


def attack(whole: Path, name: str, folder: Path, count: int, seed: int) -> None:
    """Read `count` damaged dictionaries of a format, named or recognised."""
    draw, originals = random.Random(f"{name}/{seed}"), sorted((whole / name).iterdir())
    x, before = rand(4, WIDTH), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        copy = Path(shutil.copytree(draw.choice(originals), folder / str(number)))
        file = draw.choice(sorted(path for path in copy.iterdir()))
        file.write_bytes(mutated(file.read_bytes(), file.suffix, draw))
        start = time.monotonic()
        try:
            dictionary = read_dictionary(copy, site=SITE, format=draw.choice([name, None]), k=draw.choice([None, K]))
            codes = dictionary.encode(x)
            read_code_statistics(copy, dictionary.size, name)
            assert torch.isfinite(codes.values).all() or not codes.values.numel()
        except DifflexError as error:
            assert len(str(error)) < 2000, error
        assert time.monotonic() - start < SECONDS
        shutil.rmtree(copy)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert growth < MEMORY, f"{growth:.0f} MB"


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_make_sentences(whole: Path, name: str, tmp_path: Path):
    attack(whole, name, tmp_path, QUICK, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_damaged_files_make_sentences(whole: Path, name: str, tmp_path: Path):
    attack(whole, name, tmp_path, MANY, seed=1)
