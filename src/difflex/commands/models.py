"""`difflex models`: what is inside the package."""

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import final

from difflex.errors import BrokenFile
from difflex.study import Command

__all__ = ["ModelsCommand", "table"]

COLUMNS = ("model", "pixels", "steps", "guidance", "words", "MB")


@final
@dataclass(frozen=True, kw_only=True)
class ModelsCommand(Command):
    """List the models inside the package: possible sizes (the default first), default steps and guidance, known words, size."""

    def __call__(self) -> None:
        print(table(Path(str(files("difflex") / "models"))))


def table(root: Path) -> str:
    """One line for each pipeline folder under `root`, below the names of the columns."""
    rows = [_row(index.parent) for index in sorted(root.glob("*/model_index.json"))]
    if not rows:
        return f"No model is inside the package ({root})."
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    return "\n".join("   ".join(map(str.ljust, row, widths)).rstrip() for row in (COLUMNS, *rows))


def _row(folder: Path) -> tuple[str, ...]:
    card = _card(folder / "difflex.json")
    megabytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    sizes = " ".join(f"{height}x{width}" for height, width in card.get("pixels", []))
    steps, guidance, words = card.get("steps", "-"), card.get("guidance", "-"), len(card.get("words", [])) or "-"
    return folder.name, sizes or "-", str(steps), str(guidance), str(words), f"{megabytes:.1f}"


def _card(path: Path) -> dict:
    """What `difflex.json` says; nothing where there is none, as it is optional."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise BrokenFile(f"{path} is not JSON ({error}). Install difflex again.") from error
