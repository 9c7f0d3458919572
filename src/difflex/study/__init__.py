"""The study: a folder with everything about one model, the commands to run in it, and their runner."""

from difflex.study.run import CommandRecord, CommandStatus, command_statuses, read_log, recipe_record, run_study
from difflex.study.settings import StudySettings
from difflex.study.study import Command, DictionaryRef, Study

__all__ = [
    "Command",
    "CommandRecord",
    "CommandStatus",
    "DictionaryRef",
    "Study",
    "StudySettings",
    "command_statuses",
    "read_log",
    "recipe_record",
    "run_study",
]
