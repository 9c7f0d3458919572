"""Reading and writing what passes a site: forward hooks that wrap the module and are gone when the block is left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from difflex.errors import BadInput
from difflex.pipeline.calls import CallTracker, DenoiserCall
from difflex.pipeline.sites import SiteModule
from difflex.records import Half, HookContext, Stream

__all__ = ["Visit", "holds", "on_copies", "visit", "visiting"]

Visit = Callable[[Float[Tensor, "batch token width"], HookContext], Float[Tensor, "batch token width"] | None]


@contextmanager
def visiting(clock: CallTracker, located: SiteModule, fn: Visit, half: Half | None = None) -> Iterator[None]:
    """While it lasts, `fn` meets the activations of the site at each call of the denoiser; what it returns takes their place."""

    def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> object:
        return visit(located, clock.call, args, kwargs, output, fn, half)

    with clock.watching():
        handle = located.module.register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def on_copies(fn: Visit) -> Visit:
    """`fn`, handed copies: what it does to them in place is its own affair, and it may keep them."""

    def given_a_copy(x: Float[Tensor, "batch token width"], moment: HookContext) -> Tensor | None:
        return fn(x.clone(memory_format=torch.contiguous_format), moment)

    return given_a_copy


def visit(
    located: SiteModule,
    call: DenoiserCall,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    output: object,
    fn: Visit,
    half: Half | None = None,
) -> object:
    """The output with what `fn` wrote, or None to leave it as it is."""
    whole, index = _pick(located, output)
    span = _span(located, call, whole.shape)
    seen = _tokens(whole)[:, span]
    before = None
    if located.site.kind == "update":
        before = _before(located, call, args, kwargs, whole)
        assert before.shape == seen.shape
    x = seen if before is None else seen - before
    written = _by_half(x, call, _grid(located, call, whole), fn, half)
    if written is None:
        return None
    if before is not None:
        # out + (new - old), and the very bits of `out` where nothing was changed: x - y + y is not x in floating point.
        written = torch.where(written == x, seen, seen + (written - x))
    return _put(output, index, whole, span, written)


def holds(located: SiteModule, output: object) -> bool:
    """Whether there are tokens of the stream: the last joint block of SD3 gives no text."""
    if isinstance(output, (tuple, list)):
        output = output[_index(located, len(output))] if _is_known(located, len(output)) else None
    return isinstance(output, Tensor) and output.ndim in (3, 4)


def _pick(located: SiteModule, output: object) -> tuple[Tensor, int | None]:
    """The tensor that holds the stream, and its index if it is an element of a tuple."""
    if isinstance(output, Tensor):
        return output, None
    if not isinstance(output, (tuple, list)):
        what = type(output).__name__
        raise BadInput(f"The site '{located.site}' cannot be read: {located.path} returns a {what}, not a tensor.")
    if not _is_known(located, len(output)):
        raise BadInput(
            f"The site '{located.site}' cannot be read: {located.path} returns {len(output)} things, and which of them is the "
            f"{located.site.stream} stream is known only of the blocks that have a short name. Name a module inside it."
        )
    index = _index(located, len(output))
    found = output[index]
    if not isinstance(found, Tensor):
        raise BadInput(f"The site '{located.site}' holds nothing: {located.path} gives no {located.site.stream} stream here.")
    return found, index


def _is_known(located: SiteModule, elements: int) -> bool:
    """Whether the family says which of several elements is which stream."""
    return elements == 1 or located.block is not None


def _index(located: SiteModule, elements: int) -> int:
    """Which element of a tuple holds the stream."""
    return located.block.outputs.get(located.site.stream, 0) if located.block is not None and elements > 1 else 0


def _span(located: SiteModule, call: DenoiserCall, shape: torch.Size) -> slice:
    """The tokens of the stream: all, or one side of the border where text and image lie in one tensor, text first."""
    if len(shape) != 3 or not _is_joint(located, call, shape[1]):
        return slice(None)
    return slice(call.text_tokens, None) if located.site.stream == "image" else slice(0, call.text_tokens)


def _is_joint(located: SiteModule, call: DenoiserCall, tokens: int) -> bool:
    if call.grid is None:
        return False
    both = call.text_tokens + call.grid[0] * call.grid[1]
    if located.block is None:
        return tokens == both
    streams: dict[Stream, str] = dict(located.block.neurons)
    shares = len(located.block.outputs) > 1 and located.site.kind != "neurons"
    shares |= located.site.kind == "neurons" and len(streams) > len(set(streams.values()))
    return shares and tokens == both


def _tokens(x: Tensor) -> Float[Tensor, "batch token width"]:
    """`x` seen as tokens in row-major order; a view."""
    if x.ndim == 4:
        return x.flatten(2).transpose(1, 2)
    if x.ndim == 3:
        return x
    raise BadInput(
        f"A tensor of shape {tuple(x.shape)} has no tokens. Name a module that gives [batch, token, width] or an image."
    )


def _before(
    located: SiteModule, call: DenoiserCall, args: tuple[object, ...], kwargs: dict[str, object], whole: Tensor
) -> Tensor:
    """What went into the block where `whole` came out."""
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    text = kwargs.get("encoder_hidden_states")
    joint = isinstance(hidden, Tensor) and hidden.shape == whole.shape
    given = text if located.site.stream == "text" and not joint else hidden
    if not isinstance(given, Tensor) or (given.shape != whole.shape and _tokens(given).shape[1] == whole.shape[1]):
        raise BadInput(f"The site '{located.site}' has no update: {located.path} takes in something else than it gives out.")
    tokens = _tokens(given)
    return tokens[:, _span(located, call, given.shape)]


def _grid(located: SiteModule, call: DenoiserCall, whole: Tensor) -> tuple[int, int] | None:
    """Rows and columns of the tokens at this site; a U-Net's lower levels see the image halved, rounded up."""
    if located.site.stream == "text":
        return None
    if whole.ndim == 4:
        return whole.shape[2], whole.shape[3]
    if call.grid is None:
        return None
    rows, columns = call.grid
    tokens = whole.shape[1] - call.text_tokens if _is_joint(located, call, whole.shape[1]) else whole.shape[1]
    while rows * columns > max(tokens, 1):
        rows, columns = -(-rows // 2), -(-columns // 2)
    return (rows, columns) if rows * columns == tokens else None


def _by_half(x: Tensor, call: DenoiserCall, grid: tuple[int, int] | None, fn: Visit, wanted: Half | None) -> Tensor | None:
    """What `fn` makes of each half of the batch, together again; None if it wrote nothing."""
    parts = x.chunk(len(call.halves))
    written = [
        fn(part, HookContext(call.step, call.timestep, half, call.shots, grid))
        if wanted is None or half in (wanted, None)
        else None
        for part, half in zip(parts, call.halves, strict=True)
    ]
    for new, part in zip(written, parts, strict=True):
        if new is not None and new.shape != part.shape:
            raise BadInput(f"A function at a site returned a tensor of shape {tuple(new.shape)} in place of {tuple(part.shape)}.")
    if all(new is None for new in written):
        return None
    return torch.cat([part if new is None else new.to(part) for new, part in zip(written, parts, strict=True)])


def _put(output: object, index: int | None, whole: Tensor, span: slice, written: Tensor) -> object:
    """`output` anew, with `written` in its place; strides are kept, since some kernels round by the layout of their input."""
    new = torch.empty_like(whole).copy_(whole)
    _tokens(new)[:, span] = written
    if index is None:
        return new
    assert isinstance(output, (tuple, list))
    return type(output)([*output[:index], new, *output[index + 1 :]])
