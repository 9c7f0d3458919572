"""Sites: their names, the modules behind them, and the forward hooks that read and write their activations."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import translate
from typing import NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from difflex.errors import BadInput, UnknownName
from difflex.pipeline.calls import CallTracker, DenoiserCall
from difflex.pipeline.families import BlockPattern, Family
from difflex.records import STREAMS, Half, HookContext, Kind, Site, Stream

ADVICE = "`difflex sites MODEL`, in Python `model.sites()`, lists them; a full module path works too."

SiteFunction = Callable[[Float[Tensor, "batch token width"], HookContext], Float[Tensor, "batch token width"] | None]
"""Reads the activations of a site; the tensor that it returns, if any, replaces them."""


class SiteModule(NamedTuple):
    """A site and the module that its activations come from."""

    site: Site
    """In its canonical notation: the short name if the family has one."""
    path: str
    """Module path of the block, from the pipeline."""
    module: nn.Module
    """The hooked module: the block, or for `neurons` the activation function inside it."""
    block: BlockPattern | None
    """The family's row for the block, if it has one."""


@final
class SiteMap:
    """The sites of one model."""

    def __init__(self, denoiser: nn.Module, family: Family) -> None:
        self._family = family
        self._prefix = f"{family.denoiser}." if family.denoiser else ""
        self._modules = {self._prefix + path: module for path, module in denoiser.named_modules() if path}
        self.blocks: dict[str, tuple[str, BlockPattern]] = {}
        """Module path and row of each block by short name, in the order of the model."""
        patterns = [(re.compile(re.escape(block.path).replace(r"\*", r"(\d+)")), block) for block in family.blocks]
        for path in self._modules:
            for pattern, block in patterns:
                if match := pattern.fullmatch(path):
                    self.blocks[block.name.replace("*", "{}").format(*match.groups())] = (path, block)
        self._short_names = {path: name for name, (path, _) in self.blocks.items()}

    def locate(self, site: Site | str) -> SiteModule:
        """Return the module of `site`."""
        site = Site.parse(site) if isinstance(site, str) else site
        path = self._path(site.path)
        site = replace(site, path=self._short_names.get(path, site.path))
        block = self.blocks[site.path][1] if site.path in self.blocks else None
        if block is not None and site.stream not in block.outputs:
            raise BadInput(f"The site '{site}' does not exist: {path} has no {site.stream} stream. Leave out ':{site.stream}'.")
        if site.smooth and site.stream == "text":
            raise BadInput(f"The site '{site}' does not exist: text tokens have no neighbours in the image. Leave out ':smooth'.")
        if site.kind == "neurons" and block is None:
            raise BadInput(
                f"The site '{site}' does not exist: the neurons of {path} are not known. Use the module of their activation "
                "function itself, without ':neurons'."
            )
        if site.kind != "neurons" or block is None:
            return SiteModule(site, path, self._modules[path], block)
        return SiteModule(site, path, self._modules[self._neurons(site, path, block)], block)

    def expand(self, sites: Iterable[Site | str]) -> list[SiteModule]:
        """Locate `sites`; `*` stands for one index (`double.*:text`), `..` for blocks between two (`double.18..single.37`)."""
        modules = (self.locate(name) for site in sites for name in self._matching(str(site)))
        return list({module.site: module for module in modules}.values())

    def _matching(self, text: str) -> list[str]:
        path, _, rest = text.partition(":")
        first, between, last = path.partition("..")
        if between:
            names = self._between(first, last)
        elif set(path) & set("*?["):
            pattern = re.compile(r"\.".join(_segment(part) for part in path.split(".")))
            names = [name for name in self.blocks if pattern.fullmatch(name)]
            if not names:
                raise UnknownName.among("The site pattern", text, self.blocks, ADVICE)
        else:
            return [text]
        return [f"{name}:{rest}" if rest else name for name in names]

    def _between(self, first: str, last: str) -> list[str]:
        """Return the blocks from `first` to `last` in the order of the model; of nested ones, those at the level of `first`."""
        for name in (first, last):
            if name not in self.blocks:
                raise UnknownName.among("The block", name, self.blocks, ADVICE)
        order = self._family.blocks  # diffusers registers the middle of a U-Net last
        names = sorted(self.blocks, key=lambda name: order.index(self.blocks[name][1]))
        names = [name for name in names if self._depth(name) == self._depth(first)]
        if last not in names or names.index(last) < names.index(first):
            raise BadInput(f"{first}..{last} is no range of blocks: {last} does not come after {first}, at its level. {ADVICE}")
        return names[names.index(first) : names.index(last) + 1]

    def _depth(self, name: str) -> int:
        """Return how many blocks the block `name` is inside of."""
        parts = name.split(".")
        return sum(".".join(parts[:length]) in self.blocks for length in range(1, len(parts)))

    def _path(self, name: str) -> str:
        """Return the module path for a short name or for a module path with or without the denoiser's name."""
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
        layer = next((name for name in self.blocks if name.startswith(site.path + ".") and self.blocks[name][1].neurons), None)
        advice = f"Use a layer inside it, as in '{layer}:neurons'." if layer else "Use its residual or update."
        raise BadInput(f"The site '{site}' does not exist: {path} itself has no MLP. {advice}")

    def repeated(self) -> list[str]:
        """Return the module paths of all members of module lists: the blocks of an unknown family."""
        lists = {path for path, module in self._modules.items() if isinstance(module, nn.ModuleList)}
        return [path for path in self._modules if path.rpartition(".")[0] in lists]

    def streams(self, name: str) -> tuple[Stream, ...]:
        """Return the streams of the block `name`; the output of any other module counts as image."""
        if name not in self.blocks:
            return ("image",)
        return tuple(stream for stream in STREAMS if stream in self.blocks[name][1].outputs)

    def kinds(self, name: str, stream: Stream) -> tuple[Kind, ...]:
        """Return the kinds of site that the block `name` has; any other module has `residual` only."""
        if name not in self.blocks:
            return ("residual",)
        path, block = self.blocks[name]
        neurons = block.neurons.get(stream)
        return ("residual", "update", "neurons") if neurons and f"{path}.{neurons}" in self._modules else ("residual", "update")


def _segment(pattern: str) -> str:
    """Return the regular expression of a wildcard that does not cross a dot."""
    return translate(pattern).removesuffix(r"\Z").replace(".*", "[^.]*")


@contextmanager
def hook_site(tracker: CallTracker, target: SiteModule, function: SiteFunction, half: Half | None = None) -> Iterator[None]:
    """Call `function` with the activations of `site` at each call of the denoiser within the block."""

    def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> object:
        with tracker.calling(target.site):
            return apply_at_site(target, tracker.call, args, kwargs, output, function, half)

    with tracker.tracking(), target.module.register_forward_hook(hook, with_kwargs=True):
        yield


def apply_at_site(
    target: SiteModule,
    call: DenoiserCall,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    output: object,
    function: SiteFunction,
    half: Half | None = None,
) -> object:
    """Return the output of the module with the activations that `function` returns, or None if it changes nothing."""
    whole, index = _stream_tensor(target, output)
    span = _span(target, call, whole.shape)
    tokens = _tokens(whole)[:, span]
    block_input = None
    if target.site.kind == "update":
        block_input = _block_input(target, call, args, kwargs, whole)
        assert block_input.shape == tokens.shape
    x, grid = tokens if block_input is None else tokens - block_input, _grid(target, call, whole)
    if target.site.smooth:
        x = _smoothed(x, grid, target)
    new = _apply_by_half(target.site, x, call, grid, function, half)
    if new is None:
        return None
    if x is not tokens:
        # output + (new - old), and the exact bits of the output where nothing changes: x - y + y is not x in floating point.
        edited = torch.where(new == x, tokens, tokens + (new - x))
        # A block whose update is zero returns its input, to the bit.
        new = edited if block_input is None or target.site.smooth else torch.where(new == 0, block_input, edited)
    return _replace(output, index, whole, span, new)


def _smoothed(x: Float[Tensor, "batch token width"], grid: tuple[int, int] | None, target: SiteModule) -> Tensor:
    """Return tokens averaged with their surroundings, as `Site.smooth` says."""
    if grid is None:
        raise BadInput(f"The site '{target.site}' cannot be read: the tokens of {target.path} have no places in the image.")
    image = x.unflatten(1, grid).movedim(-1, 1).float()
    around = F.avg_pool2d(image, 3, stride=1, padding=1, count_include_pad=False)  # fewer than 9 at the border
    mean = image.mean((2, 3), keepdim=True)
    return (image / 4 + around / 2 + mean / 4).movedim(1, -1).flatten(1, 2).to(x.dtype)


def _stream_tensor(target: SiteModule, output: object) -> tuple[Tensor, int | None]:
    """Return the tensor that holds the stream, and its index if it is an element of a tuple."""
    if isinstance(output, Tensor):
        return output, None
    if not isinstance(output, (tuple, list)):
        kind = type(output).__name__
        raise BadInput(f"The site '{target.site}' cannot be read: {target.path} returns a {kind}, not a tensor.")
    if target.block is None and len(output) > 1:
        raise BadInput(
            f"The site '{target.site}' cannot be read: {target.path} returns {len(output)} values, and which of them is the "
            f"{target.site.stream} stream is known only for blocks that have a short name. Use a module inside it."
        )
    index = target.block.outputs.get(target.site.stream, 0) if target.block is not None and len(output) > 1 else 0
    tensor = output[index]
    if not isinstance(tensor, Tensor):
        raise BadInput(f"The site '{target.site}' cannot be read: {target.path} returns no {target.site.stream} stream.")
    return tensor, index


def _span(target: SiteModule, call: DenoiserCall, shape: torch.Size) -> slice:
    """Return the tokens of the stream: all of them, or one part of a tensor that holds text and then image tokens."""
    if len(shape) != 3 or not _is_joint(target, call, shape[1]):
        return slice(None)
    return slice(call.text_tokens, None) if target.site.stream == "image" else slice(0, call.text_tokens)


def _is_joint(target: SiteModule, call: DenoiserCall, tokens: int) -> bool:
    """Whether a tensor of so many tokens holds both streams."""
    if call.grid is None:
        return False
    joint = tokens == call.text_tokens + call.grid[0] * call.grid[1]
    if target.block is None:
        return joint
    modules = list(target.block.neurons.values())
    shared = len(modules) > len(set(modules)) if target.site.kind == "neurons" else len(target.block.outputs) > 1
    return shared and joint


def _tokens(x: Tensor) -> Float[Tensor, "batch token width"]:
    """Return a view of `x` as tokens in row-major order."""
    if x.ndim == 4:
        return x.flatten(2).transpose(1, 2)
    if x.ndim == 3:
        return x
    raise BadInput(
        f"A tensor of shape {tuple(x.shape)} has no tokens. Use a module that returns [batch, token, width] or an image."
    )


def _block_input(
    target: SiteModule, call: DenoiserCall, args: tuple[object, ...], kwargs: dict[str, object], whole: Tensor
) -> Tensor:
    """Return the input of the block that corresponds to its output `whole`."""
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    joint = isinstance(hidden, Tensor) and hidden.shape == whole.shape
    tensor = kwargs.get("encoder_hidden_states") if target.site.stream == "text" and not joint else hidden
    if not isinstance(tensor, Tensor) or (tensor.shape != whole.shape and _tokens(tensor).shape[1] == whole.shape[1]):
        raise BadInput(f"The site '{target.site}' has no update: the input and the output of {target.path} differ in shape.")
    return _tokens(tensor)[:, _span(target, call, tensor.shape)]


def _grid(target: SiteModule, call: DenoiserCall, whole: Tensor) -> tuple[int, int] | None:
    """Return rows and columns of the tokens; the lower levels of a U-Net halve the image, rounding up."""
    if target.site.stream == "text":
        return None
    if whole.ndim == 4:
        return whole.shape[2], whole.shape[3]
    if call.grid is None:
        return None
    rows, columns = call.grid
    tokens = whole.shape[1] - call.text_tokens if _is_joint(target, call, whole.shape[1]) else whole.shape[1]
    while rows * columns > max(tokens, 1):
        rows, columns = -(-rows // 2), -(-columns // 2)
    return (rows, columns) if rows * columns == tokens else None


def _apply_by_half(
    site: Site, x: Tensor, call: DenoiserCall, grid: tuple[int, int] | None, function: SiteFunction, half: Half | None
) -> Tensor | None:
    """Apply `function` to each half of the batch, or to `half` only; None if it returns no tensor.

    It gets copies, which it may change or keep: the model may write into its own tensor, a view would keep other streams alive.
    """
    parts = x.chunk(len(call.halves))
    results = [
        function(
            part.clone(memory_format=torch.contiguous_format),
            HookContext(call.step, call.timestep, name, call.shots, grid, call.steps),
        )
        if half is None or name in (half, None)
        else None
        for part, name in zip(parts, call.halves, strict=True)
    ]
    for new, part in zip(results, parts, strict=True):
        check_result(site, new, part)
    if all(new is None for new in results):
        return None
    return torch.cat([part if new is None else new.to(part) for new, part in zip(results, parts, strict=True)])


def check_result(site: Site, new: object, part: Tensor) -> None:
    """Raise an error if what a function returned cannot replace `part`. Another dtype and another device are converted."""
    if new is None:
        return
    if not isinstance(new, Tensor):
        returned = f"{type(new).__name__} instead of a tensor"
    elif new.is_complex() or new.is_meta or new.layout != torch.strided:
        returned = f"tensor of {new.dtype}, {new.layout}, on {new.device}, which has no plain real values"
    elif new.shape != part.shape:
        returned = f"tensor of shape {tuple(new.shape)} in place of {tuple(part.shape)}"
    else:
        return
    raise BadInput(
        f"The function at the site '{site}' returned a {returned}. Return a tensor of shape {tuple(part.shape)}, or None to "
        "change nothing."
    )


def _replace(output: object, index: int | None, whole: Tensor, span: slice, tokens: Tensor) -> object:
    """Return a copy of `output` with new `tokens`; it keeps the strides, by which some kernels round."""
    new = torch.empty_like(whole).copy_(whole)
    _tokens(new)[:, span] = tokens
    if index is None:
        return new
    assert isinstance(output, (tuple, list))
    return type(output)([*output[:index], new, *output[index + 1 :]])
