"""Structured pruning of a U-Net without training, by what it computes on calibration inputs.

Inside attentions, feed-forwards and resnets, heads, channels and groups of channels are removed,
of attentions and feed-forwards up to the last, so that whole ones go where little depends on them;
what they add to the residual stream goes through one layer, the consumer, whose weights are then
fitted anew by least squares. What a removal costs is known in closed form from the consumer's
weights W and the second moments H of its inputs, as in optimal brain surgeon (Hassibi and Stork
1992). Costs of different modules are compared by how much the U-Net's output follows the module's,
which a backward pass of random vectors estimates.

The U-Net is never in memory as a whole. All evaluations go through one part of it before the next
is read; its moments are in memory for that long, and what the fits need of them is on the disk.

Letters: o outputs and i inputs of a consumer, n rows, u units (a head, a channel, a group).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from koala.architectures.config import INNER, from_unet_config
from koala.architectures.layout import Inner, inner_widths, parameters, tensor_shapes
from koala.architectures.table import UNetArchitecture
from koala.checkpoints.load import build_unet, without_weights
from koala.checkpoints.moments import Seen, principal, spilled
from koala.checkpoints.observed import observe
from koala.checkpoints.streamed import stream
from koala.checkpoints.unet_steps import Asked, evaluate
from koala.errors import UserError
from koala.utils.networks import UNet2DConditionModel

if TYPE_CHECKING:
    from koala.checkpoints.streamed import Weights

_PRODUCERS = {  # tensors whose rows are a module's inner channels
    "attention": ("to_q.weight", "to_k.weight", "to_v.weight"),
    "feed-forward": ("net.0.proj.weight", "net.0.proj.bias"),
    "resnet": (
        "conv1.weight", "conv1.bias", "time_emb_proj.weight", "time_emb_proj.bias",
        "norm2.weight", "norm2.bias",
    ),
}  # fmt: skip
_LEVELS = 16  # removals of a module that are considered


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


def measure_sensitivity(
    unet: UNet2DConditionModel, sites: Sequence[Site], every: Sequence[Asked]
) -> None:
    """Sets every site's sensitivity, by one random sum of the output an evaluation."""
    draw = torch.Generator().manual_seed(0)

    def keep(site: Site) -> Callable[..., None]:
        def add(gradient: Tensor) -> None:
            site.sensitivity += float(gradient.float().square().mean()) / len(every)

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if output.requires_grad:  # not while only the steps' inputs are found
                output.register_hook(add)

        return hook

    with contextlib.ExitStack() as hooks, torch.enable_grad():
        for site in sites:
            handle = unet.get_submodule(site.consumer).register_forward_hook(keep(site))
            hooks.callback(handle.remove)
        for asked in every:
            y = evaluate(unet, asked)
            (y * torch.randn(y.shape, generator=draw)).sum().backward()


# --- what is removed ----------------------------------------------------------------------------


def matrix(weight: Tensor) -> Tensor:
    """A consumer's weights [o, i], in float64."""
    return weight.double().flatten(1)


def levels(site: Site, weights: Tensor, inverse: Tensor) -> list[Level]:
    """The site at every width considered, from whole to none, or a resnet's last groups.

    Units go one after the other, or several together, each time those that cost least: with H^-1 of
    what is left, tr(W_u [H^-1]_uu^-1 W_u^T) once all other weights are fitted to make up for it.
    Then H^-1 of what is left is the Schur complement of what went. inverse: H^-1 [i, i], which is
    overwritten.
    """
    kept, error, fitted = torch.arange(site.units), 0.0, weights
    found = [Level(kept, error)]
    together = max(1, site.units // _LEVELS)
    per = len(inverse) // site.units
    while len(kept) > (together if site.inner.kind == "resnet" else 0):
        order = _costs(fitted, inverse, per).argsort(stable=True)
        gone, stay = (part.sort().values for part in (order[:together], order[together:]))
        lost, left = site.columns(gone), site.columns(stay)
        among, beside = inverse[lost][:, lost], inverse[lost][:, left]
        change = torch.linalg.solve(among, fitted[:, lost].T).T  # [o, lost]
        error += float(change.mul(fitted[:, lost]).sum())
        fitted = fitted[:, left].addmm(change, beside, alpha=-1)
        inverse = principal(inverse, left)
        inverse.addmm_(torch.linalg.solve(among, beside).T, beside, alpha=-1)
        kept = kept[stay]
        found.append(Level(kept, error))
    return found


def _costs(fitted: Tensor, inverse: Tensor, per: int) -> Tensor:
    """Of each unit, if it went alone."""
    width = len(inverse)
    parts = fitted.unflatten(1, (width // per, per)).permute(1, 0, 2)  # [u, o, per]
    if per == 1:
        return parts.square().sum((1, 2)) / inverse.diagonal()
    blocks = torch.stack([inverse[k : k + per, k : k + per] for k in range(0, width, per)])
    return torch.stack(
        [
            torch.linalg.solve(block, part.T).T.mul(part).sum()
            for block, part in zip(blocks, parts, strict=True)
        ]
    )


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


class Pruned(Mapping[str, Tensor]):
    """The weights of a pruned U-Net by name, each computed when it is asked for.

    Consumers are fitted anew with what was seen of their inputs; without, they are only cut.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Weights,
        sites: Sequence[Site],
        chosen: Mapping[str, Level],
        seen: Mapping[str, Seen] | None,
    ) -> None:
        """config, weights: of the whole U-Net."""
        self.weights, self.seen = weights, seen
        narrow = {
            site.path: (site, chosen[site.path].kept)
            for site in sites
            if len(chosen[site.path].kept) < site.units
        }
        inner = {path: len(kept) * site.inner.unit for path, (site, kept) in narrow.items()}
        self.config = {k: v for k, v in config.items() if not k.startswith("_")} | {INNER: inner}
        self.shapes = tensor_shapes(from_unet_config(self.config))
        self._cut = {
            f"{path}.{leaf}": (site, kept)
            for path, (site, kept) in narrow.items()
            for leaf in _PRODUCERS[site.inner.kind]
        }
        self._fits = {site.consumer: (site, kept) for site, kept in narrow.values()}
        self._made: dict[str, Tensor] = {}  # by a fit, and not asked for yet

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._cut:
            site, kept = self._cut[name]
            rows = _channels(site, kept)
            if site.inner.kind == "feed-forward":  # values, then gates
                rows = torch.cat([rows, rows + site.inner.width])
            return self.weights[name][rows]
        layer = name.rpartition(".")[0]
        if layer not in self._fits:
            return self.weights[name]
        if name not in self._made:
            self._made = self._fit(layer, *self._fits[layer])
        return self._made.pop(name)

    def _fit(self, layer: str, site: Site, kept: Tensor) -> dict[str, Tensor]:
        weight, bias = self.weights[f"{layer}.weight"], self.weights[f"{layer}.bias"]
        whole, columns = matrix(weight), site.columns(kept)
        if self.seen is None:
            cut = whole[:, columns]
        else:
            cut, gain = self.seen[site.path].fitted(whole, columns)
            bias = (bias + gain).to(bias.dtype)
        shape = (len(weight), len(kept) * site.inner.unit, *weight.shape[2:])
        return {f"{layer}.weight": cut.reshape(shape).to(weight.dtype), f"{layer}.bias": bias}


def _channels(site: Site, kept: Tensor) -> Tensor:
    return (kept[:, None] * site.inner.unit + torch.arange(site.inner.unit)).flatten()


def unet_of(config: Mapping[str, Any], weights: Weights) -> UNet2DConditionModel:
    """A U-Net that reads its weights as it runs."""
    with without_weights():
        unet = build_unet(config)
    stream(unet, weights)
    return unet.eval()


def prune(
    config: Mapping[str, Any],
    weights: Weights,
    share: float,
    every: Sequence[Asked],
    scratch: Path,
    advance: Callable[[str], object] = lambda what: None,
) -> Pruned:
    """A U-Net with `share` fewer parameters that computes nearly the same in these evaluations.

    config, weights: of an unpruned U-Net. scratch: a folder for large files, which must be there
    as long as the result is used. advance: called with the name of each part of the work as it
    begins. UserError for a share that cannot be removed.
    """
    arch = from_unet_config(config)
    sites = sites_of(arch)
    seen, found = what_is_seen(config, weights, sites, every, scratch, advance)
    return Pruned(config, weights, sites, choose(arch, sites, found, share), seen)


def what_is_seen(
    config: Mapping[str, Any],
    weights: Weights,
    sites: Sequence[Site],
    every: Sequence[Asked],
    scratch: Path,
    advance: Callable[[str], object] = lambda what: None,
) -> tuple[dict[str, Seen], dict[str, list[Level]]]:
    """What the fits need and the levels of every site, whose sensitivities are set; see `prune`."""
    unet = unet_of(config, weights)
    advance("sensitivity")
    measure_sensitivity(unet, sites, every)
    advance("moments")
    seen, found, of = {}, {}, {site.consumer: site for site in sites}
    for consumer, moments in observe(unet, [*of], every, scratch):
        site = of[consumer]
        seen[site.path], inverse = spilled(moments, scratch / site.path)
        del moments
        weight = matrix(weights[f"{consumer}.weight"])
        found[site.path] = levels(site, weight, inverse)
        del inverse  # before the next one's moments are there
    return seen, found
