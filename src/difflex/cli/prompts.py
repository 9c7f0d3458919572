"""Where prompts come from on the command line: a file, or the endless captions of the drawn world."""

import hashlib
import random
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from difflex.errors import BadInput, UnknownName
from difflex.miniature.captions import endless

__all__ = ["CAPTIONS", "Prompts", "read_prompts"]

CAPTIONS = "captions"


class Prompts(NamedTuple):
    """Prompts and what they were read from."""

    texts: Iterable[str]
    source: str
    """Changes with the prompts or their order."""
    is_endless: bool


def read_prompts(name: str, shuffle: int | None) -> Prompts:
    """The prompts of the file `name`, one a line, shuffled by a seed if one is given; or `captions`, which do not end."""
    if name == CAPTIONS:
        if shuffle is not None:
            raise BadInput("--shuffle goes with a file: the captions of the drawn world come in no order. Leave it out.")
        return Prompts(endless(), CAPTIONS, True)
    path = Path(name)
    if not path.is_file():
        raise UnknownName(f"--prompts {name} is not there. Name a text file with a prompt a line, or {CAPTIONS}.")
    content = path.read_bytes()
    try:
        texts = [line for line in content.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
    if not texts:
        raise BadInput(f"{path} holds no prompt. Write one a line.")
    if shuffle is not None:
        random.Random(shuffle).shuffle(texts)
    return Prompts(texts, f"sha256:{hashlib.sha256(content).hexdigest()}", False)
