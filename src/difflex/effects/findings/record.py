"""What experiments found: curves, the numbers that the rules look at, verdicts; as it is written and read again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple, final

from difflex.effects import StrengthCurve, StrengthPoint
from difflex.errors import BadInput
from difflex.files import parsing, read_json, write_json

__all__ = ["Finding", "FindingLine", "Findings", "Verdict"]

FORMAT = 1
AGAIN = "Delete it and run the command that makes it again."
Verdict = Literal["holds here", "does not hold here", "cannot be said"]


class FindingLine(NamedTuple):
    """A line of a figure: means over concepts, and the standard error of each."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    errors: tuple[float, ...]
    concepts: int
    """Over how many concepts."""


@final
@dataclass(frozen=True, kw_only=True)
class Finding:
    """A claim of a paper, what would make it false, and what was found."""

    name: str
    claim: str
    paper: str
    rule: str
    """When it holds."""
    verdict: Verdict
    because: str
    """The numbers that decided, or what was lacking, as a sentence."""
    numbers: Mapping[str, float]
    x: str
    """What the lines run over: the title of an axis."""
    y: str
    lines: tuple[FindingLine, ...]
    curves: tuple[StrengthCurve, ...]
    """All that was judged; `method` is the condition. Where captions of several kinds are compared, `quality` is over the largest
    loss that unedited images of a kind have."""
    made_from: Mapping[str, str | int | float]
    """What the figures depend on."""


@final
@dataclass(frozen=True, kw_only=True)
class Findings:
    """The experiments that were made at one site of a model."""

    model: str
    revision: str | None
    site: str
    parameters: int
    """Of the denoiser: how large the model is."""
    found: tuple[Finding, ...]

    def of(self, name: str) -> Finding | None:
        """The finding called `name`, if its experiment was made."""
        return next((each for each in self.found if each.name == name), None)

    def save(self, path: Path) -> Path:
        """`path`, which now holds this as JSON."""
        try:
            return write_json(path, FORMAT, asdict(self))
        except OSError as error:
            raise BadInput(f"Findings cannot be written to {path}: {error}. Name a study that you may write to.") from error

    @classmethod
    def load(cls, path: Path) -> Findings:
        """What was written to `path`."""
        try:
            said = read_json(path, FORMAT, AGAIN)
            with parsing(path, "findings", AGAIN):
                return cls(**{**said, "found": tuple(map(_finding, said["found"]))})
        except FileNotFoundError as error:
            raise BadInput(f"There is no {path}. difflex findings makes it.") from error


def _finding(said: Mapping[str, object]) -> Finding:
    lines, curves = said["lines"], said["curves"]
    assert isinstance(lines, list) and isinstance(curves, list)
    parts = {
        "lines": tuple(FindingLine(name, tuple(x), tuple(y), tuple(errors), concepts) for name, x, y, errors, concepts in lines),
        "curves": tuple(
            StrengthCurve(**{**each, "points": tuple(StrengthPoint(**point) for point in each["points"])}) for each in curves
        ),
    }
    return Finding(**{**said, **parts})  # pyright: ignore[reportArgumentType]
