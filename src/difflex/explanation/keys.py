"""API keys: read and checked before use, and removed from whatever repeats them."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import final

from difflex.errors import BadInput

LONGEST = 1024
"""Characters of a key."""
SECRET = 8
"""Characters from which on a key is a secret: local servers are given words such as EMPTY, which answers may well contain."""
KEY_VARIABLE = "OPENAI_API_KEY"
"""The environment variable that is read unless another one is named; it may be unset, as for local servers."""


@final
@dataclass(frozen=True)
class ApiKey:
    """An API key; its `repr` does not contain the secret."""

    secret: str = field(repr=False)
    """Empty for no key."""
    source: str
    """Where it was read from, for errors."""

    def __post_init__(self) -> None:
        if self.secret and not re.fullmatch(f"[!-~]{{1,{LONGEST}}}", self.secret):
            raise BadInput(
                f"The API key from {self.source} is not valid: it has {_fault(self.secret)}. A key is 1 to {LONGEST} "
                "printable ASCII characters without spaces, alone in its file or variable. For a server without a key give none."
            )

    @classmethod
    def read(cls, file: Path | None, variable: str = KEY_VARIABLE, environment: Mapping[str, str] = os.environ) -> ApiKey:
        """Read the key from `file`, or else from an environment variable.

        Errors name neither a file that does not exist nor a variable that is not set: it may be the key itself.
        """
        if file is None:
            if variable not in environment and variable != KEY_VARIABLE:
                raise BadInput(
                    "The environment variable that should hold the API key (--key-variable) is not set. Set it, or name another."
                )
            return cls(environment.get(variable, "").strip(), f"${variable}")
        try:
            with file.open("rb") as opened:
                content = opened.read(LONGEST + 100)  # more is no key, and may be endless
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not the name of a file"
            raise BadInput(f"The key file cannot be read: {reason}. Name a text file that contains the key alone.") from None
        if not content.strip():
            raise BadInput(f"The key file {file} is empty. Write the key into it, or name no file for a server without a key.")
        return cls(content.decode("latin-1").removeprefix("\xef\xbb\xbf").strip(), str(file))

    def redact(self, text: str) -> str:
        """Return `text` without the secret, also where it is escaped or encoded, as in a header or an address."""
        return self._pattern.sub("[key]", text) if len(self.secret) >= SECRET else text

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        secret = self.secret.encode()
        encoded = {re.escape(part) for offset in range(3) for part in _base64_parts(secret, offset)}
        return re.compile("|".join([*sorted(encoded), f"(?i:{secret.hex()})", _escaped(self.secret)]))

    def __str__(self) -> str:
        return f"the API key from {self.source}" if self.secret else "no API key" + (f" in {self.source}" if self.source else "")


def _fault(secret: str) -> str:
    """Return what is wrong with a key, without repeating any of it."""
    lines, words = len(secret.splitlines()), len(secret.split())
    if lines > 1 or words > 1:
        return f"{lines} lines" if lines > 1 else f"{words} words"
    return f"{len(secret)} characters" if re.fullmatch("[!-~]+", secret) else "characters that are not printable ASCII"


def _escaped(secret: str) -> str:
    """Return a pattern of `secret` whose characters may be escaped as in JSON, addresses or HTML, also several times."""
    letters = (
        rf"(?:\\{{0,8}}{re.escape(letter)}|%(?:25){{0,4}}{ord(letter):02x}|\\{{1,8}}u00{ord(letter):02x}"
        rf"|&(?:amp;){{0,4}}#(?:0{{0,4}}{ord(letter)}|x0{{0,4}}{ord(letter):x});?)"
        for letter in secret
    )
    return f"(?i:{''.join(letters)})"


def _base64_parts(secret: bytes, offset: int) -> list[str]:
    """Return what stands in base64 for `secret` after `offset` other bytes, without letters that depend on its neighbours."""
    code = base64.b64encode(bytes(offset) + secret).decode().rstrip("=")
    start, end = -(-offset * 8 // 6), (offset + len(secret)) * 8 // 6
    part = code[start:end]
    return [part, part.replace("+", "-").replace("/", "_")]
