"""The table of sites: widths and token counts, found by a weightless twin of the denoiser that computes shapes only."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import cast

import torch
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from difflex.errors import BadInput
from difflex.pipeline.calls import DenoiserCall
from difflex.pipeline.engine import Engine
from difflex.pipeline.hooks import holds, visit
from difflex.pipeline.sites import SiteMap, SiteModule, SiteRow
from difflex.quiet import quiet
from difflex.records import STREAMS, HookContext, Shot, Site

__all__ = ["shapes_of", "site_rows"]


def site_rows(engine: Engine, shot: Shot, pattern: str = "*") -> list[SiteRow]:
    """A row for each block and stream whose name matches `pattern` (both streams, if it names none), in a run like `shot`.

    Of a model whose family is not known, the outermost of the repeated modules that give tokens, by their module paths.
    """
    found = [each.site for each in engine.sites.expand([pattern])] if pattern != "*" else []
    names = [site.path for site in found] or list(engine.sites.blocks) or engine.sites.repeated()
    streams = {site.stream for site in found} if ":" in pattern else set(STREAMS)
    with engine.clock.watching():
        args, kwargs = engine.first_call(shot)
        call = engine.clock.call
    twin = _twin(engine.denoiser, kwargs)
    sites = SiteMap(twin, engine.family)
    asked = [
        Site(name, kind, stream)
        for name in dict.fromkeys(names)
        for stream in sites.streams(name)
        if stream in streams
        for kind in sites.kinds(name, stream)
        if kind != "update"
    ]
    shapes = shapes_of(twin, [sites.locate(site) for site in asked], call, args, kwargs)
    rows = [_row(sites, site, shapes) for site in asked if site.kind == "residual" and site in shapes]
    if not rows:
        raise BadInput(f"Nothing called '{pattern}' gives tokens: one tensor of [batch, token, width] or an image. Name another.")
    return rows if engine.sites.blocks or found else [row for row in rows if not any(_is_inside(row, other) for other in rows)]


def _row(sites: SiteMap, site: Site, shapes: Mapping[Site, torch.Size]) -> SiteRow:
    inner = Site(site.path, "neurons", site.stream)
    return SiteRow(
        site=site,
        path=sites.locate(site).path,
        width=shapes[site][2],
        tokens=shapes[site][1],
        kinds=sites.kinds(site.path, site.stream),
        neurons=shapes[inner][2] if inner in shapes else None,
    )


def _is_inside(row: SiteRow, other: SiteRow) -> bool:
    return row.path.startswith(f"{other.path}.")


def _twin(denoiser: nn.Module, given: dict[str, object]) -> nn.Module:
    """The denoiser without its weights: on the meta device every operation yields a shape and computes nothing."""
    with torch.device("meta"):
        mixin = cast(ConfigMixin, denoiser)
        twin = cast(nn.Module, type(mixin).from_config(mixin.config))
    text = given["encoder_hidden_states"]
    with quiet("diffusers.models.modeling_utils"):
        return twin.to(text.dtype).eval() if isinstance(text, Tensor) else twin.eval()


@torch.no_grad()
def shapes_of(
    twin: nn.Module, sites: Sequence[SiteModule], call: DenoiserCall, args: tuple[object, ...], kwargs: dict[str, object]
) -> dict[Site, torch.Size]:
    """What each site would show; a site whose block gives nothing for its stream is left out."""
    shapes: dict[Site, torch.Size] = {}

    def watch(located: SiteModule) -> None:
        def fn(x: Tensor, moment: HookContext) -> None:
            shapes[located.site] = x.shape

        def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
            if holds(located, output):
                visit(located, call, args, kwargs, output, fn)

        stack.callback(located.module.register_forward_hook(hook, with_kwargs=True).remove)

    with ExitStack() as stack:
        for located in sites:
            watch(located)
        args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        twin(*args, **kwargs)
    return shapes
