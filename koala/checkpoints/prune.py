"""Structured pruning of a U-Net without training, by what it computes on calibration inputs.

Inside attentions, feed-forwards and resnets, heads, channels and groups of channels are removed,
of attentions and feed-forwards up to the last, so that whole ones go where little depends on them;
what they add to the residual stream goes through one layer, the consumer, whose weights are then
fitted anew by least squares. What a removal costs is known in closed form from the consumer's
weights W and the second moments H of its inputs, as in optimal brain surgeon (Hassibi and Stork
1992). Costs of different modules are compared by how much the U-Net's output follows the module's,
which a backward pass of random vectors estimates.

Letters: o outputs and i inputs of a consumer, n rows, u units (a head, a channel, a group).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from koala.architectures.config import INNER, from_unet_config
from koala.architectures.layout import Inner, inner_widths, parameters, tensor_shapes
from koala.architectures.table import UNetArchitecture
from koala.checkpoints.load import build_unet, without_weights
from koala.errors import UserError
from koala.utils.networks import UNet2DConditionModel

# One evaluation of a U-Net, [n, c, h, w], as calibration asks for it.
Call = Callable[[UNet2DConditionModel], Tensor]
_PRODUCERS = {  # tensors whose rows are a module's inner channels
    "attention": ("to_q.weight", "to_k.weight", "to_v.weight"),
    "feed-forward": ("net.0.proj.weight", "net.0.proj.bias"),
    "resnet": (
        "conv1.weight", "conv1.bias", "time_emb_proj.weight", "time_emb_proj.bias",
        "norm2.weight", "norm2.bias",
    ),
}  # fmt: skip
_LEVELS = 16  # removals of a module that are considered
_DAMPING = 1e-3  # of the mean second moment, added to each


@dataclass
class Moments:
    """Of a consumer's inputs over all rows, in float64: sums [i] and products [i, i].

    Rounding to float32 hides what a removal costs: inputs of one module are nearly dependent.
    """

    rows: int
    total: Tensor  # [i]
    products: Tensor  # [i, i]

    @property
    def mean(self) -> Tensor:
        return self.total / self.rows

    @property
    def covariance(self) -> Tensor:
        """Damped, so that it has an inverse."""
        h = self.products - self.rows * torch.outer(self.mean, self.mean)
        damping = _DAMPING * h.diagonal().mean() + torch.finfo(h.dtype).tiny
        return h + damping * torch.eye(len(h), dtype=h.dtype)


@dataclass
class Site:
    """A module that can be narrowed."""

    path: str
    inner: Inner
    sensitivity: float = 0.0  # mean squared gradient of random sums of the U-Net's output

    @property
    def units(self) -> int:
        return self.inner.width // self.inner.unit

    @property
    def consumer(self) -> str:
        return self.path + {"attention": ".to_out.0", "feed-forward": ".net.2"}.get(
            self.inner.kind, ".conv2"
        )

    def columns(self, units: Tensor) -> Tensor:
        """The consumer's inputs that belong to the units, as its matrix has them."""
        per = self.inner.unit * (9 if self.inner.kind == "resnet" else 1)
        return (units[:, None] * per + torch.arange(per)).flatten()


@dataclass(frozen=True)
class Level:
    """A module at one width: the units that stay, and the squared error of what it puts out."""

    kept: Tensor
    error: float


def sites_of(arch: UNetArchitecture) -> list[Site]:
    """The modules of an unpruned U-Net. UserError for a pruned one."""
    if arch.inner:
        raise UserError("this U-Net is pruned already: prune the model that it was made of")
    return [Site(path, inner) for path, inner in inner_widths(arch).items()]


# --- what is seen -------------------------------------------------------------------------------


@torch.no_grad()
def observe(
    unet: UNet2DConditionModel, sites: Sequence[Site], calls: Sequence[Call]
) -> dict[str, Moments]:
    """The moments of every site's consumer's inputs, by path."""
    found: dict[str, Moments] = {}

    def keep(site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = _rows(inputs[0], site).float()
            before = found.get(site.path)
            if before is None:
                width = rows.shape[1]
                zeros = torch.zeros(width + 1, width, dtype=torch.float64)
                before = Moments(0, zeros[0], zeros[1:])
                found[site.path] = before
            before.rows += len(rows)
            before.total += rows.sum(0)
            before.products += rows.T @ rows

        return hook

    with contextlib.ExitStack() as hooks:
        for site in sites:
            handle = unet.get_submodule(site.consumer).register_forward_pre_hook(keep(site))
            hooks.callback(handle.remove)
        for call in calls:
            call(unet)
    return found


def _rows(x: Tensor, site: Site) -> Tensor:
    """A consumer's inputs as the rows [n, i] that its matrix multiplies."""
    if site.inner.kind == "resnet":
        return F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
    return x.flatten(0, -2)


def matrix(consumer: Any) -> Tensor:
    """A consumer's weights [o, i], in float64."""
    return consumer.weight.detach().double().flatten(1)


def measure_sensitivity(
    unet: UNet2DConditionModel, sites: Sequence[Site], calls: Sequence[Call]
) -> None:
    """Sets every site's sensitivity, by one random sum of the output a call."""
    draw, outputs = torch.Generator().manual_seed(0), {}

    def keep(path: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            output = output.requires_grad_() if not output.requires_grad else output
            outputs[path] = output
            output.retain_grad()
            return output

        return hook

    with contextlib.ExitStack() as hooks, torch.enable_grad():
        for site in sites:
            handle = unet.get_submodule(site.consumer).register_forward_hook(keep(site.path))
            hooks.callback(handle.remove)
        for call in calls:
            y = call(unet)
            (y * torch.randn(y.shape, generator=draw)).sum().backward()
            for site in sites:
                gradient = outputs[site.path].grad
                assert gradient is not None
                site.sensitivity += float(gradient.float().square().mean()) / len(calls)
            outputs.clear()


# --- what is removed ----------------------------------------------------------------------------


def levels(site: Site, weights: Tensor, moments: Moments) -> list[Level]:
    """The site at every width considered, from whole to none, or a resnet's last group.

    Units go one after the other, or several together, each time those that cost least: with H^-1 of
    what is left, tr(W_u [H^-1]_uu^-1 W_u^T) once all other weights are fitted to make up for it.
    """
    h = moments.covariance
    kept, found = torch.arange(site.units), []
    together = max(1, site.units // _LEVELS)
    while len(kept):
        columns = site.columns(kept)
        inverse = torch.linalg.inv(h[columns][:, columns])
        cross = weights @ h[:, columns]
        fitted = cross @ inverse
        lost = weights.clone()
        lost[:, columns] -= fitted
        found.append(Level(kept, float((lost @ h).mul(lost).sum())))
        per = len(columns) // len(kept)
        blocks = torch.stack(
            [inverse[k : k + per, k : k + per] for k in range(0, len(columns), per)]
        )
        parts = fitted.unflatten(1, (len(kept), per)).permute(1, 0, 2)  # [u, o, per]
        costs = torch.linalg.solve(blocks, parts.transpose(1, 2)).transpose(1, 2).mul(parts)
        order = costs.sum((1, 2)).argsort(stable=True)
        kept = kept[order[together:].sort().values]
    if site.inner.kind != "resnet":  # the module as a whole: its mean stays, as a bias
        found.append(Level(kept, float((weights @ h).mul(weights).sum())))
    return found


def choose(
    arch: UNetArchitecture,
    sites: Sequence[Site],
    found: Mapping[str, Sequence[Level]],
    share: float,
) -> dict[str, Level]:
    """A level of every site, so that at least `share` of the parameters goes at the least cost.

    Step by step, each time the site and the next level whose cost per parameter is lowest.
    """
    goal = share * parameters(arch)
    at, removed = {site.path: 0 for site in sites}, 0
    per_unit = {site.path: parameters_of(arch, site) for site in sites}
    while removed < goal:
        best: tuple[float, str, int] | None = None
        for site in sites:
            path, options = site.path, found[site.path]
            here = options[at[path]]
            for k in range(at[path] + 1, len(options)):
                fewer = (len(here.kept) - len(options[k].kept)) * per_unit[path]
                price = site.sensitivity * (options[k].error - here.error) / fewer
                if best is None or price < best[0]:
                    best = (price, path, k)
        if best is None:
            most = removed / parameters(arch)
            raise UserError(f"--prune {share:g}: of this U-Net at most {most:.2f} can be removed")
        _, path, k = best
        removed += (len(found[path][at[path]].kept) - len(found[path][k].kept)) * per_unit[path]
        at[path] = k
    return {path: found[path][k] for path, k in at.items()}


def parameters_of(arch: UNetArchitecture, site: Site) -> int:
    """Parameters that a unit of the site takes along."""
    shapes = tensor_shapes(arch)
    names = [f"{site.path}.{leaf}" for leaf in _PRODUCERS[site.inner.kind]]
    sizes = [math.prod(shapes[name]) for name in (*names, f"{site.consumer}.weight")]
    return sum(sizes) // site.units


# --- the pruned U-Net ---------------------------------------------------------------------------


@torch.no_grad()
def pruned(
    unet: UNet2DConditionModel,
    sites: Sequence[Site],
    chosen: Mapping[str, Level],
    moments: Mapping[str, Moments],
    refit: bool = True,
) -> UNet2DConditionModel:
    """A new U-Net with the units that stay, its consumers fitted anew if `refit`."""
    arch, weights = from_unet_config(unet.config), dict(unet.state_dict())
    widths = {}
    for site in sites:
        kept = chosen[site.path].kept
        if len(kept) == site.units:
            continue
        widths[site.path] = len(kept) * site.inner.unit
        _narrow(site, kept, weights, moments[site.path], refit)
    with without_weights():
        config = {k: v for k, v in unet.config.items() if not k.startswith("_")}
        smaller = build_unet(
            config | {INNER: {p: widths[p] for p in inner_widths(arch) if p in widths}}
        )
    smaller.load_state_dict(weights, assign=True)
    return smaller.eval().requires_grad_(False)


def _narrow(
    site: Site, kept: Tensor, weights: dict[str, Tensor], moments: Moments, refit: bool
) -> None:
    """Cuts the tensors of one module in `weights`."""
    channels = (kept[:, None] * site.inner.unit + torch.arange(site.inner.unit)).flatten()
    columns = site.columns(kept)
    name = site.consumer
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    whole = weight.double().flatten(1)
    if refit:
        h = moments.covariance
        cut = torch.linalg.solve(h[columns][:, columns], (whole @ h[:, columns]).T).T
        shift = whole @ moments.mean - cut @ moments.mean[columns]
        weights[f"{name}.bias"] = (bias + shift).to(bias.dtype)
    else:
        cut = whole[:, columns]
    shape = (len(weight), len(channels), *weight.shape[2:])
    weights[f"{name}.weight"] = cut.reshape(shape).to(weight.dtype)
    rows = channels
    if site.inner.kind == "feed-forward":  # values, then gates
        rows = torch.cat([channels, channels + site.inner.width])
    for leaf in _PRODUCERS[site.inner.kind]:
        weights[f"{site.path}.{leaf}"] = weights[f"{site.path}.{leaf}"][rows].contiguous()


def prune(
    unet: UNet2DConditionModel,
    share: float,
    calls: Sequence[Call],
    advance: Callable[[str], object] = lambda what: None,
) -> UNet2DConditionModel:
    """A U-Net with `share` fewer parameters that computes nearly the same on the calls' inputs.

    unet: float32 on the CPU, unpruned; it is not changed. advance: called with the name of each
    part of the work as it begins. UserError for a share that cannot be removed.
    """
    arch = from_unet_config(unet.config)
    sites = sites_of(arch)
    advance("sensitivity")
    measure_sensitivity(unet, sites, calls)
    advance("moments")
    moments = observe(unet, sites, calls)
    advance("choice")
    found = {
        site.path: levels(site, matrix(unet.get_submodule(site.consumer)), moments[site.path])
        for site in sites
    }
    return pruned(unet, sites, choose(arch, sites, found, share), moments)
