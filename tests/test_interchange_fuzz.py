"""Damaged files of other tools: a dictionary or a sentence, never a traceback, a hang or much memory."""

import json
import random
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from interchange_cases import FROZEN, SITE, WIDTH, K, cases, fae_file, note, our_itda, our_sae, rand

from difflex.dictionaries import Normalisation
from difflex.errors import DifflexError
from difflex.interchange import FORMATS, read_dictionary, write_dictionary

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK, MANY = 30, 2000
MEMORY, SECONDS = 300, 10.0
"""MB that the process may grow by, and how long a file may take."""
ODD = [None, True, "", "x", -1, 0, 1.5, 1e400, 2**31, 10**18, "nan", [], [1], {}, {"k": 1}, "\ud800", "../x", "9" * 400]
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
    write_dictionary(our_itda("matching", Normalisation.identity(WIDTH)), "itda", root / "itda" / "itda")
    write_dictionary(our_itda("gradient"), "itda-flux", root / "itda-flux" / "itda")
    fae_file(root / "fae" / "fae")
    return root


def mutated(content: bytes, suffix: str, draw: random.Random) -> bytes:
    """Change a file: an entry of its JSON, some of its bytes, or its length."""
    way = draw.random()
    if way < 0.5 and suffix == ".json":
        return odd_json(content, draw)
    if way < 0.6 and suffix == ".safetensors":
        length = int.from_bytes(content[:8], "little")
        head = odd_json(content[8 : 8 + length], draw)
        return len(head).to_bytes(8, "little") + head + content[8 + length :]
    if way < 0.75:
        return content[: draw.randrange(len(content))]
    if way < 0.8 and suffix == ".safetensors":
        return draw.randrange(2**64).to_bytes(8, "little") + content[8:]
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 4, 64])):
        changed[draw.randrange(min(len(changed), draw.choice([64, 1024, 10**9])))] = draw.randrange(256)
    return bytes(changed)


def odd_json(content: bytes, draw: random.Random) -> bytes:
    """Change, add or remove an entry at any depth."""
    entries = json.loads(content)
    place = entries
    while (inner := [value for value in place.values() if isinstance(value, dict)]) and draw.random() < 0.7:
        place = draw.choice(inner)
    name = draw.choice([*place, "new"])
    if draw.random() < 0.2:
        place.pop(name, None)
    elif isinstance(place.get(name), list) and draw.random() < 0.7:
        place[name] = [draw.choice([0, 1, -1, 2**40, 2**63, 7]) for _ in range(draw.choice([1, 2, 2, 3]))]
    else:
        place[name] = draw.choice(ODD)
    return json.dumps(entries).encode("utf-8", "replace")


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
