"""`difflex report`: write the report of a study."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

from tyro.conf import Positional, arg

from difflex.commands.words import words
from difflex.study import Command, Study

__all__ = ["ReportCommand"]

CONTROL = "untrained"
"""The folder in a study where recipes put that of an untrained model."""


@final
@dataclass(frozen=True, kw_only=True)
class ReportCommand(Command):
    """Write the report of a study: one page with tables, figures and claims, and a CSV file for every figure."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """The folder of the study."""
    control: Annotated[
        Path | None, arg(metavar="STUDY", help_behavior_hint="(default: STUDY/untrained, where recipes put it)")
    ] = None
    """A study of the same model untrained, whose features are compared with those of this one."""

    def __call__(self) -> list[Path]:
        from difflex.report import write_report

        study = Study.open(self.study)
        inside = self.study / CONTROL
        control = self.control or (inside if (inside / "study.json").is_file() else None)
        paths = write_report(study, control and Study.open(control), words)
        print(f"{paths[0]}: the report, with {len(paths) - 1} CSV files in {paths[0].parent / 'report'}")
        return paths
