"""Miniature language models: trained on text of the drawn world with known behaviours, which a parser recognises."""

from difflex.miniature.language.grammar import (
    BEHAVIOURS,
    ChoiceQuestion,
    choice_question,
    held_out_documents,
    introduction,
    open_question,
    own_story,
    read_story,
)

__all__ = [
    "BEHAVIOURS",
    "ChoiceQuestion",
    "choice_question",
    "held_out_documents",
    "introduction",
    "open_question",
    "own_story",
    "read_story",
]
