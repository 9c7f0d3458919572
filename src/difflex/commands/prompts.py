"""Where prompts come from on the command line: files, data sets, or the endless captions of the drawn world."""

import hashlib
import random
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from difflex import pipeline
from difflex.errors import BadInput
from difflex.miniature.captions import endless

__all__ = ["CAPTIONS", "PromptSource", "read_prompts"]

CAPTIONS = "captions"


class PromptSource(NamedTuple):
    """Prompts and what they were read from."""

    texts: Iterable[str]
    source: str
    """Changes with the prompts."""
    is_endless: bool


def read_prompts(name: str, shuffle: int | None, column: str | None = None, revision: str | None = None) -> PromptSource:
    """The prompts in the file, folder or data set `name`, shuffled by a seed if one is given; or `captions`, which do not end."""
    if name == CAPTIONS and not Path(name).exists():
        if shuffle is not None:
            raise BadInput("--shuffle goes with a file: the captions of the drawn world come in no order. Leave it out.")
        return PromptSource(endless(), CAPTIONS, True)
    texts: Iterable[str] = pipeline.read_prompts(name, column, revision)
    source = ":".join(filter(None, (_content(Path(name)) or name, column, revision)))
    if shuffle is not None:
        texts = list(texts)
        random.Random(shuffle).shuffle(texts)
    return PromptSource(texts, source, False)


def _content(path: Path) -> str | None:
    """What changes with a file's content; None for anything but a file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
