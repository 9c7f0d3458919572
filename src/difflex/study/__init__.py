"""The study: a model, a folder with everything that is known about it, the commands to run there, and the runner."""

from difflex.study.run import CommandRecord, StudyStep, diary, recipe_of, run_study, steps
from difflex.study.study import GROWING, Command, DictionaryRef, Study

__all__ = [
    "GROWING",
    "Command",
    "CommandRecord",
    "DictionaryRef",
    "Study",
    "StudyStep",
    "diary",
    "recipe_of",
    "run_study",
    "steps",
]
