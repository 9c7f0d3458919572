"""The road of the package: which station may import which, and where each outside package is at home."""

import ast
import shutil
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "difflex"

# Every station may import these, which import nothing of ours above them.
GROUND = {
    "records",
    "choices",
    "dictionary_config",
    "errors",
    "files",
    "json_records",
    "tensors",
    "distributed",
    "devices",
    "progress",
    "sqlite",
    "tables",
    "values",
}
# Station -> the other stations it may import. `difflex` stands for the public names of the package itself.
ARROWS: dict[str, set[str]] = {
    "_version": set(),
    "errors": set(),
    "choices": set(),
    "quiet": set(),
    "progress": set(),
    "tables": set(),
    "sqlite": {"errors"},
    "values": {"errors"},
    "records": {"errors", "choices", "values"},
    "json_records": {"errors", "files", "records", "values"},
    "dictionary_config": {"errors", "files", "records"},
    "files": {"errors"},
    "tensors": {"errors", "files"},
    "distributed": {"errors"},
    "devices": {"errors"},
    "hub": {"dictionary_config", "errors", "files", "records"},
    "images": {"errors", "files"},
    "pipeline": {*GROUND, "images", "quiet"},
    "miniature": {*GROUND, "quiet"},
    "store": GROUND,
    "dictionaries": {*GROUND, "hub"},
    "interchange": {*GROUND, "dictionaries"},
    "study": GROUND,
    "training": {*GROUND, "dictionaries", "store", "study"},
    "evaluation": {*GROUND, "dictionaries", "images", "miniature", "store", "study"},
    "features": {*GROUND, "dictionaries", "images", "store", "study"},
    "explanation": {*GROUND, "dictionaries", "features", "miniature", "study"},
    "steering": {*GROUND, "dictionaries", "images", "store", "study"},
    "effects": {*GROUND, "dictionaries", "evaluation", "explanation", "images", "miniature", "steering", "store", "study"},
    "measures": {
        *GROUND,
        "dictionaries",
        "effects",
        "evaluation",
        "explanation",
        "features",
        "images",
        "miniature",
        "steering",
        "study",
    },
    "explore": {
        *GROUND,
        "dictionaries",
        "evaluation",
        "features",
        "images",
        "miniature",
        "pipeline",
        "steering",
        "store",
        "study",
        "training",
    },
    "report": {
        *GROUND,
        "dictionaries",
        "effects",
        "evaluation",
        "explanation",
        "features",
        "images",
        "measures",
        "steering",
        "store",
        "study",
    },
    "activation_files": {*GROUND, "store"},
    "control_vectors": {*GROUND, "steering"},
    "publication": {*GROUND, "dictionaries", "evaluation", "features", "hub", "images", "report", "steering", "study"},
    "web": {*GROUND, "_version", "effects", "explore", "features", "steering", "study"},
    "difflex": {
        *GROUND,
        "dictionaries",
        "evaluation",
        "explore",
        "miniature",
        "pipeline",
        "steering",
        "store",
        "study",
        "training",
    },
    "commands": {
        *GROUND,
        "activation_files",
        "control_vectors",
        "dictionaries",
        "difflex",
        "effects",
        "evaluation",
        "explanation",
        "explore",
        "features",
        "hub",
        "images",
        "interchange",
        "measures",
        "miniature",
        "pipeline",
        "publication",
        "report",
        "steering",
        "store",
        "study",
        "training",
        "web",
    },
    "recipes": {"choices", "commands", "errors", "pipeline", "records", "study"},
    "cli": {"errors", "study", "commands"},
    "testing": {*GROUND, "pipeline", "features", "quiet"},
    "__main__": {"cli"},
}

# Doors inside of stations: what others may import from besides the stations themselves.
INNER_DOORS = {
    "commands.checks",
    "commands.effects",
    "commands.estimates",
    "commands.evaluation",
    "commands.explain",
    "commands.features",
    "commands.flags",
    "commands.forecast",
    "commands.harvest",
    "commands.measures",
    "commands.study",
    "commands.training",
    "commands.verify",
    "dictionaries.files",
    "dictionaries.itda",
    "dictionaries.normalisation",
    "dictionaries.pursuit",
    "dictionaries.sparse",
    "effects.activation_addition",
    "effects.addition_findings",
    "effects.concept_specs",
    "effects.drawn_behaviours",
    "effects.drawn_world",
    "effects.edit_bench",
    "effects.finding_rules",
    "effects.findings",
    "effects.inputs",
    "effects.removal",
    "effects.removal_world",
    "evaluation.anatomy",
    "evaluation.concepts",
    "evaluation.concepts.results",
    "evaluation.transfer",
    "evaluation.image_similarity",
    "explanation.backends",
    "explanation.comparison",
    "explanation.endpoint",
    "explanation.questions",
    "explore.activations",
    "explore.inputs",
    "explore.language",
    "explore.model",
    "explore.search",
    "features.collecting",
    "features.detected",
    "features.entries",
    "features.explanations",
    "features.votes",
    "measures.block_roles",
    "miniature.captions",
    "miniature.judge",
    "miniature.language",
    "miniature.world",
    "pipeline.language",
    "pipeline.profile",
    "report.comparison",
    "report.figures.gallery",
    "report.reading",
    "steering.contrast",
    "steering.features",
    "steering.strengths",
    "store.live",
    "training.itda",
    "training.study",
    "web.model",
}

# Tensors are the language of all stations but these, which stay light: they are imported before anybody asks for a tensor.
LIGHT = {
    "_version",
    "difflex",
    "__main__",
    "choices",
    "cli",
    "commands",
    "dictionary_config",
    "errors",
    "files",
    "hub",
    "images",
    "progress",
    "quiet",
    "recipes",
    "sqlite",
    "study",
    "tables",
}

# Outside package -> the stations where it is at home.
HOMES: dict[str, set[str]] = {
    "torch": ARROWS.keys() - LIGHT,
    "jaxtyping": ARROWS.keys() - LIGHT,
    "einops": ARROWS.keys() - LIGHT,
    "diffusers": {"pipeline", "miniature", "quiet", "testing"},
    "transformers": {"pipeline", "miniature", "evaluation", "explanation", "quiet", "testing"},
    # Our own files are in `tensors`; the others read and write models.
    "pyarrow": {"activation_files"},
    "safetensors": {"activation_files", "tensors", "pipeline", "miniature", "dictionaries", "interchange", "training"},
    "huggingface_hub": {"hub"},
    "tqdm": {"progress", "miniature", "training"},
    "PIL": {
        "commands",
        "effects",
        "evaluation",
        "explanation",
        "explore",
        "features",
        "images",
        "miniature",
        "pipeline",
        "publication",
        "report",
        "steering",
        "testing",
        "web",
    },
    "pydantic": {"explanation", "web"},
    "jinja2": {"report", "web"},
    "markupsafe": {"report"},
    "tyro": {"cli", "commands", "recipes"},
    "bitsandbytes": {"pipeline"},
    "datasets": {"pipeline"},
    "httpcore2": {"explanation"},
    "triton": {"training"},
    "anyio": {"web"},
    "fastapi": {"web"},
    "starlette": {"web"},
    "uvicorn": {"commands"},
    "numpy": {"activation_files", "explore", "web"},
}
# Of these, what only an extra of pyproject.toml brings, and which one.
EXTRAS = {
    "bitsandbytes": "nf4",
    "datasets": "data",
    "pyarrow": "data",
    "httpcore2": "vlm",
    "triton": "dev",
    "anyio": "web",
    "fastapi": "web",
    "starlette": "web",
    "uvicorn": "web",
}

# A plain string that whatever is written to disk may carry: no arrow.
VERSION = "difflex._version.__version__"
# Names under which packages are installed, where they differ from the ones they are imported by.
DISTRIBUTIONS = {"PIL": "pillow"}
# Dependencies that work without being imported by us: for diffusers when it loads a model.
SILENT = {"accelerate"}


def station(source: Path, file: Path) -> str:
    """The station that `file` belongs to."""
    first = file.relative_to(source).parts[0].removesuffix(".py")
    return "difflex" if first == "__init__" else first


def imports(file: Path, source: Path) -> Iterator[str]:
    """The full name of everything that `file` imports, wherever the import stands and whatever it is for."""
    package = ["difflex", *file.relative_to(source).parent.parts]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def passes_a_door(source: Path, parts: list[str]) -> bool:
    """Whether `difflex.PARTS` names something inside a station that is not shown by one of its doors."""
    inside = [part for part in parts[:-1]]
    if (source.joinpath(*parts)).with_suffix(".py").exists() or source.joinpath(*parts, "__init__.py").exists():
        inside = parts  # a module, not a name in one
    return len(inside) > 1 and ".".join(inside) not in INNER_DOORS


def violations(source: Path) -> list[str]:
    """Everything under `source` that the two tables do not allow, and every row of theirs that nothing needs."""
    found, seen_outside = [], set()
    files = sorted(source.rglob("*.py"))
    stations = {station(source, file) for file in files}
    for file in files:
        here, place = station(source, file), file.relative_to(source)
        for name in imports(file, source):
            top, *rest = name.split(".")
            if name == VERSION:
                continue
            if top == "difflex":
                there = rest[0] if rest and rest[0] in stations else "difflex"
                if there != here and there not in ARROWS.get(here, set()):
                    found.append(f"{place}: {here} may not import {there} ({name})")
                elif there != here and passes_a_door(source, rest):
                    found.append(f"{place}: {name} is imported past a door")
            elif top not in sys.stdlib_module_names:
                seen_outside.add(top)
                if here not in HOMES.get(top, set()):
                    found.append(f"{place}: {top} is not at home in {here}")
    found += [f"station {name} has no row in ARROWS" for name in sorted(stations - ARROWS.keys())]
    found += [f"ARROWS has a row for {name}, which does not exist" for name in sorted(ARROWS.keys() - stations)]
    found += [f"HOMES has a row for {name}, which nothing imports" for name in sorted(HOMES.keys() - seen_outside)]
    return found


def test_every_import_follows_the_tables():
    found = violations(SOURCE)
    assert not found, "\n".join(found)


def test_the_arrows_have_no_cycle():
    assert set(TopologicalSorter(ARROWS).static_order()) == set(ARROWS)


def test_every_dependency_is_imported_and_every_import_is_a_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {line.split(">=")[0] for line in project["dependencies"]}
    assert declared == {DISTRIBUTIONS.get(name, name) for name in HOMES.keys() - EXTRAS.keys()} | SILENT
    extras = {extra: {line.split(">=")[0] for line in lines} for extra, lines in project["optional-dependencies"].items()}
    assert all(name in extras[extra] for name, extra in EXTRAS.items())


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("errors.py", "import torch", "torch is not at home in errors"),
        ("records.py", "from difflex.miniature import world", "records may not import miniature"),
        ("errors.py", "from . import records", "errors may not import records"),
        ("images.py", "def late():\n    from difflex.pipeline import load", "images may not import pipeline"),
        ("miniature/world.py", "if TYPE_CHECKING:\n    from .. import cli", "miniature may not import cli"),
        ("miniature/world.py", "from ..pipeline import load", "miniature may not import pipeline"),
        ("records.py", "from difflex import load", "records may not import difflex"),
        ("training/fitting.py", "from difflex.store.manifest import Manifest", "imported past a door"),
        ("records.py", "import requests", "requests is not at home in records"),
        ("helpers.py", "", "station helpers has no row"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, line: str, complaint: str):
    source = shutil.copytree(SOURCE, tmp_path / "difflex", ignore=shutil.ignore_patterns("models", "__pycache__"))
    with (source / file).open("a") as planted:
        planted.write(f"\n{line}\n")
    assert any(complaint in violation for violation in violations(source))


def test_a_row_without_its_station_is_found(tmp_path: Path):
    source = shutil.copytree(SOURCE, tmp_path / "difflex", ignore=shutil.ignore_patterns("models", "__pycache__"))
    (source / "images.py").unlink()
    assert "ARROWS has a row for images, which does not exist" in violations(source)
