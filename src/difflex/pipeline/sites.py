"""Names of sites and the modules behind them."""

import re
from collections.abc import Iterable
from fnmatch import translate
from typing import NamedTuple, final

from torch import nn

from difflex.errors import BadInput, UnknownName
from difflex.pipeline.families import BlockPattern, Family
from difflex.records import STREAMS, Kind, Site, Stream

__all__ = ["SiteMap", "SiteModule", "SiteRow"]

ADVICE = "`sites` lists them; a full module path works too."


class SiteModule(NamedTuple):
    """A site and the modules that it is read from."""

    site: Site
    """In its canonical notation: the short name where the family has one."""
    path: str
    """Module path of the block, from the pipeline."""
    module: nn.Module
    """Where the hook goes: the block, or the activation inside it for `neurons`."""
    block: BlockPattern | None
    """The family's row; None for a module that has none."""


class SiteRow(NamedTuple):
    """A row of the table of sites: a block and one of its streams."""

    site: Site
    path: str
    width: int
    tokens: int
    kinds: tuple[Kind, ...]
    neurons: int | None
    """Width of `neurons`, where there are any."""


@final
class SiteMap:
    """The sites of one model."""

    def __init__(self, denoiser: nn.Module, family: Family) -> None:
        self._family = family
        self._prefix = f"{family.denoiser}."
        self._modules = {self._prefix + path: module for path, module in denoiser.named_modules() if path}
        self.blocks: dict[str, tuple[str, BlockPattern]] = {}
        """Short name -> module path and row, in the order of the model."""
        patterns = [(re.compile(re.escape(block.path).replace(r"\*", r"(\d+)")), block) for block in family.blocks]
        for path in self._modules:
            for pattern, block in patterns:
                if found := pattern.fullmatch(path):
                    self.blocks[_fill(block.name, found.groups())] = (path, block)
        self._short = {path: name for name, (path, _) in self.blocks.items()}

    def locate(self, site: Site | str) -> SiteModule:
        """The modules behind `site`."""
        site = Site.parse(site) if isinstance(site, str) else site
        path = self._path(site.path)
        site = Site(self._short.get(path, site.path), site.kind, site.stream)
        block = self.blocks[site.path][1] if site.path in self.blocks else None
        if block is not None and site.stream not in block.outputs:
            raise BadInput(f"The site '{site}' does not exist: {path} has no {site.stream} stream. Leave out ':{site.stream}'.")
        if site.kind == "neurons" and block is None:
            raise BadInput(
                f"The site '{site}' does not exist: where {path} has its neurons is not known. Name the module of their "
                "activation function itself, without ':neurons'."
            )
        if site.kind != "neurons" or block is None:
            return SiteModule(site, path, self._modules[path], block)
        return SiteModule(site, path, self._modules[self._neurons(site, path, block)], block)

    def expand(self, sites: Iterable[Site | str]) -> list[SiteModule]:
        """The sites named, wildcards included: `double.*:text`, `down.*.1`. A star stands for one index."""
        found: dict[Site, SiteModule] = {}
        for site in sites:
            for located in map(self.locate, self._matching(str(site))):
                found[located.site] = located
        return list(found.values())

    def _matching(self, text: str) -> list[str]:
        path, _, rest = text.partition(":")
        if not set(path) & set("*?["):
            return [text]
        pattern = re.compile(r"\.".join(_segment(part) for part in path.split(".")))
        names = [name for name in self.blocks if pattern.fullmatch(name)]
        if not names:
            raise UnknownName.among("The site pattern", text, self.blocks, ADVICE)
        return [f"{name}:{rest}" if rest else name for name in names]

    def _path(self, name: str) -> str:
        """The module path, from the pipeline, of a short name or a module path with or without the denoiser's name."""
        if name in self.blocks:
            return self.blocks[name][0]
        for path in (name, self._prefix + name):
            if path in self._modules:
                return path
        raise UnknownName.among("The site", name, [*self.blocks, *([] if self.blocks else self._modules)], ADVICE)

    def _neurons(self, site: Site, path: str, block: BlockPattern) -> str:
        inner = f"{path}.{block.neurons.get(site.stream, '')}"
        if inner in self._modules:
            return inner
        inside = next((name for name in self.blocks if name.startswith(site.path + ".") and self.blocks[name][1].neurons), None)
        advice = f"Name a layer inside it, as in '{inside}:neurons'." if inside else "Ask for its residual or update."
        raise BadInput(f"The site '{site}' does not exist: {path} itself has no MLP. {advice}")

    def repeated(self) -> list[str]:
        """Module paths of all members of lists of modules: where the blocks of an unknown family are."""
        lists = {path for path, module in self._modules.items() if isinstance(module, nn.ModuleList)}
        return [path for path in self._modules if path.rpartition(".")[0] in lists]

    def streams(self, name: str) -> tuple[Stream, ...]:
        """What streams the block `name` has; other modules are taken for image."""
        return (
            tuple(stream for stream in STREAMS if stream in self.blocks[name][1].outputs) if name in self.blocks else ("image",)
        )

    def kinds(self, name: str, stream: Stream) -> tuple[Kind, ...]:
        """What can be asked of the block `name`, and of any module."""
        if name not in self.blocks:
            return ("residual",)
        path, block = self.blocks[name]
        neurons = block.neurons.get(stream)
        return ("residual", "update", "neurons") if neurons and f"{path}.{neurons}" in self._modules else ("residual", "update")


def _fill(pattern: str, indices: Iterable[str]) -> str:
    for index in indices:
        pattern = pattern.replace("*", index, 1)
    return pattern


def _segment(pattern: str) -> str:
    """The regular expression of a wildcard that does not cross a dot."""
    return translate(pattern).removesuffix(r"\Z").replace(".*", "[^.]*")
