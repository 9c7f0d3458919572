"""`difflex compare`: two studies side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

from tyro.conf import Positional, arg

from difflex.errors import BadInput
from difflex.report import read_facts
from difflex.report.comparison import compare, describe, write_comparison
from difflex.study import Command, Study

__all__ = ["CompareCommand"]


@final
@dataclass(frozen=True, kw_only=True)
class CompareCommand(Command):
    """Say and draw how two studies differ: what was asked, which dictionaries there are, and every figure of those in both."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """The folder of a study."""
    other: Annotated[Positional[Path], arg(metavar="OTHER")]
    """The folder of another one, of the same model or not; differences are this one's figures less the first one's."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("compare.html")
    """Where the page goes: one file that needs nothing from outside."""

    def __call__(self) -> list[Path]:
        comparison = compare(*(read_facts(Study.open(folder)) for folder in (self.study, self.other)))
        if self.out.is_dir():
            raise BadInput(f"--out {self.out} is a folder. Name a file, as in {self.out / 'compare.html'}.")
        print(describe(comparison))
        try:
            page = write_comparison(comparison, self.out)
        except OSError as error:
            raise BadInput(f"--out {self.out} cannot be written: {error}. Name a file that you may write.") from error
        print(f"{page}: the same as a page")
        return [page]
