"""The tokens of the miniature language models: the words and marks of the grammar, in a tokenizer of transformers."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from difflex.files import write_file
from difflex.miniature.language.grammar import vocabulary

SPECIAL = ("<s>", "</s>", "<unk>")
START, END, UNKNOWN = range(len(SPECIAL))
PIECE = r"\w+|[^\w\s]"
"""A word, or a mark."""


@cache
def _numbers() -> dict[str, int]:
    return {piece: i for i, piece in enumerate((*SPECIAL, *vocabulary()))}


def token_ids(text: str | None = None) -> list[int]:
    """Return the tokens of a document with start and end; of None, all tokens."""
    numbers = _numbers()
    if text is None:
        return [*numbers.values()]
    return [START, *(numbers.get(piece, UNKNOWN) for piece in re.findall(PIECE, text)), END]


def write_tokenizer(folder: Path, most: int) -> None:
    """Write the tokenizer, of texts of at most `most` tokens, to a folder."""
    flags = {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False, "special": True}
    single = [{"SpecialToken": {"id": SPECIAL[START], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    first = {"id": SPECIAL[START], "ids": [START], "tokens": [SPECIAL[START]]}
    parts: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": piece, **flags} for i, piece in enumerate(SPECIAL)],
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": PIECE}, "behavior": "Removed", "invert": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": single,
            "special_tokens": {SPECIAL[START]: first},
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {"type": "WordLevel", "vocab": _numbers(), "unk_token": SPECIAL[UNKNOWN]},
    }
    names = dict(zip(("bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": most, **names}
    for name, content in (("tokenizer.json", parts), ("tokenizer_config.json", settings)):
        write_file(folder / name, (json.dumps(content, indent=1) + "\n").encode())
