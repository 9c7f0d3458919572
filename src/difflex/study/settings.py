"""`StudySettings`: how the model of a study runs, and on which prompts, as the harvest that filled the study chose it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, final

from difflex.choices import Precision
from difflex.errors import BadInput
from difflex.values import check_fields


@final
@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What later commands of a study repeat unless their flags say otherwise; None is the model's own default, or unknown."""

    precision: Precision | None = None
    offload: bool = False
    text_length: int | None = None
    """Tokens of a prompt that the model reads, padding included."""
    pixels: tuple[int, int] | None = None
    """Height and width of an image."""
    steps: int | None = None
    guidance: float | None = None
    prompts: str | None = None
    """A file or folder by its absolute path, a data set on the hub (OWNER/NAME:COLUMN), or `captions`."""
    prompts_column: str | None = None
    prompts_revision: str | None = None
    shuffle: int | None = None
    """The seed that shuffles the prompts."""
    seeds: tuple[int, int] | None = None
    """The first seed of each prompt, and the one after the last; None where prompt number i has the seed i."""
    keep_steps: tuple[int, ...] | None = None
    """The first step that is harvested, the one after the last, and the distance between steps if that is not 1."""

    def __post_init__(self) -> None:
        check_fields(self)

    def __str__(self) -> str:
        """Return what decides how an image comes out, as far as it is set."""
        size = self.pixels and "x".join(map(str, self.pixels))
        run = {
            "precision": self.precision,
            "text length": self.text_length,
            "pixels": size,
            "steps": self.steps,
            "guidance": self.guidance,
        }
        return ", ".join(f"{name} {value}" for name, value in run.items() if value is not None)

    def as_json(self) -> dict[str, Any]:
        """Return the settings that differ from their defaults."""
        defaults = asdict(StudySettings())
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}

    @classmethod
    def from_json(cls, entries: Mapping[str, Any]) -> StudySettings:
        """Return the settings that `as_json` gave."""
        if not isinstance(entries, Mapping):
            raise BadInput(f"they are a {type(entries).__name__} instead of names with values.")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(entries.keys() - known):
            raise BadInput(f"The setting '{unknown[0]}' is unknown; the settings of a study are {', '.join(sorted(known))}.")
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in entries.items()}
        return cls(**values)
