"""The key to an endpoint: from a file or the environment, and to nowhere but the endpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import final

from difflex.errors import BadInput

__all__ = ["ApiKey"]


@final
class ApiKey:
    """A secret: it shows itself to nobody who does not ask for it by name."""

    def __init__(self, secret: str, told: str) -> None:
        """`told` says where it is from."""
        self._secret, self._told = secret, told

    @classmethod
    def found(cls, file: Path | None, variable: str, environment: Mapping[str, str] = os.environ) -> ApiKey:
        """The key in `file`, or else in the environment's `variable`; an empty one where there is none, as for local servers."""
        if file is None:
            return cls(environment.get(variable, "").strip(), f"${variable}")
        try:
            lines = file.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(
                f"The key file {file} cannot be read ({type(error).__name__}). Name a text file of one line."
            ) from None
        if len(lines) != 1:
            raise BadInput(f"The key file {file} holds {len(lines)} words. Write the key into it and nothing else.")
        return cls(lines[0], str(file))

    @property
    def is_empty(self) -> bool:
        """Whether there is none."""
        return not self._secret

    def reveal(self) -> str:
        """The secret itself."""
        return self._secret

    def hidden(self, text: str) -> str:
        """`text`, in which the secret is blotted out: an endpoint may well repeat what it was sent."""
        return text.replace(self._secret, "[key]") if self._secret else text

    def __repr__(self) -> str:
        return f"Key(from {self._told})"
