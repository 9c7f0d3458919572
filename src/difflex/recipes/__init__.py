"""Recipes: functions from a folder, and options, to a `Study` with its commands.

Write one in a file of your own and run it: `difflex run my_recipe.py:study`; commands are imported from here. To vary a recipe,
call it and replace what differs. A flag of `difflex run` is passed to the argument of its name, if the function has one.
"""

from difflex.commands.effects import FindingsCommand as FindingsCommand
from difflex.commands.effects import RemovalCommand as RemovalCommand
from difflex.commands.effects import SteerEvalCommand as SteerEvalCommand
from difflex.commands.evaluation import AnatomyCommand as AnatomyCommand
from difflex.commands.evaluation import ConceptsCommand as ConceptsCommand
from difflex.commands.evaluation import EvaluateCommand as EvaluateCommand
from difflex.commands.evaluation import TransferCommand as TransferCommand
from difflex.commands.explain import ExplainCommand as ExplainCommand
from difflex.commands.features import CollectCommand as CollectCommand
from difflex.commands.harvest import HarvestCommand as HarvestCommand
from difflex.commands.measures import BlockRolesCommand as BlockRolesCommand
from difflex.commands.measures import MeasureCommand as MeasureCommand
from difflex.commands.study import ReportCommand as ReportCommand
from difflex.commands.training import ItdaCommand as ItdaCommand
from difflex.commands.training import NeuronsCommand as NeuronsCommand
from difflex.commands.training import TrainCommand as TrainCommand
from difflex.recipes.drawn import mini, mini_full
from difflex.recipes.papers import flux_dev, flux_schnell, mini_sdxl, sdxl_turbo
from difflex.recipes.run import RECIPES, Recipe, RunCommand, recipe
from difflex.study import Study as Study

__all__ = [
    "RECIPES",
    "Recipe",
    "RunCommand",
    "flux_dev",
    "flux_schnell",
    "mini",
    "mini_full",
    "mini_sdxl",
    "recipe",
    "sdxl_turbo",
]
