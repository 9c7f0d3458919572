"""`difflex run`: a whole study by a recipe."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.errors import BadInput
from difflex.recipes import recipe
from difflex.recipes.planning import machine_rate, plan, plan_table
from difflex.run import run_study
from difflex.study import Command, Study

__all__ = ["RunCommand"]


@final
@dataclass(frozen=True, kw_only=True)
class RunCommand(Command):
    """Run a recipe: its commands in order; given again it goes on, and does again only what a change has made useless."""

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """mini, mini_full, flux_schnell, flux_dev, sdxl_turbo; or FILE.py:FUNCTION, a function from a folder to a Study."""
    out: Annotated[Path | None, arg(metavar="STUDY", help_behavior_hint="(default: a folder of the recipe's name)")] = None
    """The folder of the study; begun if it is not there."""
    until: Annotated[str | None, arg(metavar="VERB", help_behavior_hint="(default: to the end)")] = None
    """Stop after the last command of this verb: harvest, train, ..."""
    dry_run: FlagCreatePairsOff[bool] = False
    """Say what would be done and what it would take, and do nothing."""

    def __call__(self) -> None:
        study = recipe(self.recipe)(self.out or Path(self.recipe.rpartition(":")[2]))
        if not isinstance(study, Study):
            raise BadInput(f"The recipe {self.recipe} gave {type(study).__name__}, not a difflex.Study.")
        if self.dry_run:
            print(plan_table(plan(study, machine_rate())))
            return
        run_study(study, until=self.until, recipe=self.recipe)
        print(f"{study.folder.resolve()}: every command {'' if self.until is None else f'up to {self.until} '}is done")
