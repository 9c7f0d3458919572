"""`difflex compare`: compare two studies."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

from tyro.conf import Positional, arg

from difflex.errors import BadInput
from difflex.study import Command, Study

__all__ = ["CompareCommand"]


@final
@dataclass(frozen=True, kw_only=True)
class CompareCommand(Command):
    """Compare two studies: their settings, their dictionaries, and every metric of the dictionaries that both have."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """The folder of a study."""
    other: Annotated[Positional[Path], arg(metavar="OTHER")]
    """The folder of a second study, of the same model or not; differences are its values less those of the first."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("compare.html")
    """The file of the page."""

    def __call__(self) -> list[Path]:
        from difflex.report import read_facts
        from difflex.report.comparison import compare, describe, write_comparison

        comparison = compare(*(read_facts(Study.open(folder)) for folder in (self.study, self.other)))
        if self.out.is_dir():
            raise BadInput(f"--out {self.out} is a folder. Name a file, as in {self.out / 'compare.html'}.")
        print(describe(comparison))
        try:
            write_comparison(comparison, self.out)
        except OSError as error:
            raise BadInput(f"--out {self.out} cannot be written: {error}. Name a file that you may write.") from error
        print(f"{self.out}: the page")
        return [self.out]
