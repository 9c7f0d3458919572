"""`difflex sites`: where a model can be read and written."""

from dataclasses import dataclass
from typing import Annotated, final

from tyro.conf import arg

from difflex.commands.flags import ModelCommand, Pixels

__all__ = ["SitesCommand"]

COLUMNS = ("site", "module", "width", "tokens", "kinds")


@final
@dataclass(frozen=True, kw_only=True)
class SitesCommand(ModelCommand):
    """List a model's sites: name, module path, width, tokens, kinds; a line for each block and stream."""

    pattern: Annotated[str, arg(metavar="PATTERN")] = "*"
    """Only sites of this name; a star stands for one index, as in double.*"""
    pixels: Annotated[Pixels | None, arg(metavar="HEIGHTxWIDTH", help_behavior_hint="(default: the model's own)")] = None
    """Size of an image, on which the number of tokens depends."""

    def __call__(self) -> None:
        lines: list[tuple[str, ...]] = [COLUMNS]
        for row in self.load().sites(self.pattern, self.pixels):
            kinds = " ".join(f"{kind} ({row.neurons})" if kind == "neurons" else kind for kind in row.kinds)
            lines.append((str(row.site), row.path, str(row.width), str(row.tokens), kinds))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        print("\n".join("   ".join(map(str.ljust, line, widths)).rstrip() for line in lines))
