"""A small network that starts as near to a large one as least squares bring it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedimpr.errors import ConfigError
from fedimpr.observation import frozen
from fedimpr.synthesis.base import classes_of

RIDGE = 1e-6  # of the mean square of a layer's inputs: keeps weights small that no image says anything about
CHUNK = 500  # images whose patches are held at a time


def reconstruct(smaller: nn.Module, larger: nn.Module, images: Tensor) -> None:
    """Give a network, in place, those units of a larger one that tell the most of it, and weights refitted to them.

    Layer by layer, from the first: of the larger network's units those are left out, one after another, without which the next layer's
    answers can best be made of the others (ThiNet, Luo, Wu and Lin, ICCV 2017, section 3.2). What the next layer then weighs them by is
    fitted by least squares to what the larger network answers, on what the smaller one has made of the images so far (He, Zhang and Sun,
    "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, section 3). What it costs to leave a unit out is known
    without another fit (Optimal Brain Surgeon, Hassibi and Stork, NIPS 1992, for all weights of a unit at once). A network as wide as
    the larger one in all layers becomes the same function on such images.

    A short schedule gains by it (``benchmarks/results/nearer_start.md``). After 9,000 steps the best of sixteen students that began with
    units as they were (:func:`fedimpr.models.inherit`) is as near.

    Both are chains of convolutions and full connections, each layer reading what the one before it made and nothing else. The work grows
    with the cube of the weights of one unit of the larger one: seconds for a LeNet-5.

    Args:
        smaller: the network that starts, e.g. a ``lenet5_half``; it has no batch norm.
        larger: a network of the same layers, each at least as wide; it may have batch norm behind them. Left as it is.
        images: (N, C, H, W) in [0, 1], e.g. some thousand views of impressions.

    Raises:
        ConfigError: a network is not such a chain, or the larger one has other layers or a narrower one.
        TeacherError: the larger network cannot take the images, or its logits are not finite.
    """
    classes_of(larger, (images.shape[1], images.shape[2], images.shape[3]), images.device)
    with torch.no_grad(), frozen(smaller, larger):
        x, links = _chain("smaller", smaller, images)
        theirs, wide = _chain("larger", larger, images)
        _check(links, wide)
        wanted = wide[0].answer(theirs)
        squares, products = _squares(links[0].read(x), wanted)
        fit = _inverse(squares) @ products
        for place, link in enumerate(links[:-1]):
            units, after = len(wide[place].layer.weight), links[place + 1]
            made = link.passed(link.computed(x, fit))
            wanted = wide[place + 1].answer(wide[place].passed(wanted))
            kept, next_fit = _thinned(*_squares(after.read(made), wanted), units, len(link.layer.weight))
            link.take(fit[:, kept])
            x, fit = made.unflatten(1, (units, -1))[:, kept].flatten(1, 2), next_fit
        links[-1].take(fit)


class _Link(NamedTuple):
    """A layer with weights, and what follows it until the next one."""

    layer: nn.Conv2d | nn.Linear
    norm: nn.Module | None
    rest: list[nn.Module]

    def answer(self, x: Tensor) -> Tensor:
        """What the layer makes of all it reads, behind its batch norm."""
        answer: Tensor = self.layer(x)
        return answer if self.norm is None else self.norm(answer)

    def passed(self, x: Tensor) -> Tensor:
        """What the next layer gets of an answer."""
        for module in self.rest:
            x = module(x)
        return x

    def read(self, x: Tensor) -> Callable[[slice], Tensor]:
        """By a part of the images, what is weighed for each place of the layer's answer: (places, values), one unit's beside each other."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return lambda part: x[part]
        asked = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return lambda part: F.unfold(x[part], *asked).transpose(1, 2).flatten(0, 1)  # type: ignore[arg-type]

    def computed(self, x: Tensor, fit: Tensor) -> Tensor:
        """What the layer would answer with other weights (values + 1, units), the last ones biases."""
        weight, bias = fit[:-1].T.to(x.dtype), fit[-1].to(x.dtype)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, bias)
        kernels = weight.unflatten(1, (-1, *self.layer.kernel_size))
        return F.conv2d(x, kernels, bias, self.layer.stride, self.layer.padding, self.layer.dilation)

    def take(self, fit: Tensor) -> None:
        """Take over weights (values + 1, units)."""
        self.layer.weight.copy_(fit[:-1].T.reshape(self.layer.weight.shape))
        assert self.layer.bias is not None
        self.layer.bias.copy_(fit[-1])


def _chain(name: str, network: nn.Module, images: Tensor) -> tuple[Tensor, list[_Link]]:
    """What the first layer of a network reads of images, and its layers in the order of their calls."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    leaves = [module for module in network.modules() if next(module.children(), None) is None]
    hooks = [leaf.register_forward_hook(lambda leaf, given, made: calls.append((leaf, given[0], made))) for leaf in leaves]
    try:
        logits = network(images)
    finally:
        for hook in hooks:
            hook.remove()
    links: list[_Link] = []
    for leaf, _, _ in calls:
        if isinstance(leaf, nn.Conv2d | nn.Linear):
            links.append(_Link(leaf, None, []))
        elif links and isinstance(leaf, _BatchNorm) and links[-1].norm is None and not links[-1].rest:
            links[-1] = links[-1]._replace(norm=leaf)
        elif links:
            links[-1].rest.append(leaf)
    read = [given for leaf, given, _ in calls if links and leaf is links[0].layer]
    # Each call reads the very tensor that the one before it made: nothing is added or left out in between.
    passed_on = all(made is given for (_, _, made), (_, given, _) in zip(calls, [*calls[1:], (network, logits, logits)], strict=True))
    kernels = [link.layer for link in links if isinstance(link.layer, nn.Conv2d)]
    plain = all(layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str) for layer in kernels)
    if not (links and passed_on and plain and len(calls) == len({leaf for leaf, _, _ in calls})):
        raise ConfigError(name, type(network).__name__, "a chain of plain convolutions and full connections")
    return read[0], links


def _check(links: list[_Link], wide: list[_Link]) -> None:
    def form(link: _Link) -> list[object]:
        layer = link.layer
        shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation) if isinstance(layer, nn.Conv2d) else ()
        return [type(layer), *shape, *map(str, link.rest)]

    if [form(link) for link in links] != [form(link) for link in wide]:
        found = f"{len(wide)} layers with weights, not those of the smaller one"
        raise ConfigError("larger", found, f"a network of the same {len(links)} layers, with the same ones in between")
    for place, (link, other) in enumerate(zip(links, wide, strict=True)):
        if link.norm is not None or link.layer.bias is None:
            raise ConfigError("smaller", f"layer {place + 1}", "layers with biases and without batch norm")
        mine, theirs = len(link.layer.weight), len(other.layer.weight)
        if theirs < mine or (place + 1 == len(links) and theirs != mine):
            raise ConfigError("larger", f"{theirs} units in layer {place + 1}", f"at least {mine}, and as many classes")


def _squares(read: Callable[[slice], Tensor], wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean products (V + 1, V + 1) of what is read with itself, a one behind it, and (V + 1, U) with what is wanted: (N, U, ...)."""
    squares = products = torch.zeros((), device=wanted.device, dtype=torch.float64)
    count = 0
    for start in range(0, len(wanted), CHUNK):
        part = slice(start, start + CHUNK)
        values = read(part).double()
        values = torch.cat([values, torch.ones_like(values[:, :1])], 1)
        answers = wanted[part].flatten(2).transpose(1, 2).flatten(0, 1) if wanted.dim() > 2 else wanted[part]
        squares, products, count = squares + values.T @ values, products + values.T @ answers.double(), count + len(values)
    return squares / count, products / count


def _inverse(squares: Tensor) -> Tensor:
    """The inverse of mean products, the least of a ridge on them."""
    size = squares.diagonal()[:-1].mean().clamp_min(1e-6)  # all that is read may be zero, as behind a dead layer
    ridge = RIDGE * size * torch.eye(len(squares), device=squares.device, dtype=squares.dtype)
    inverse: Tensor = torch.linalg.inv(squares + ridge)
    return inverse


def _thinned(squares: Tensor, products: Tensor, units: int, keep: int) -> tuple[Tensor, Tensor]:
    """Which ``keep`` of the units whose values were read are kept, and the fit (values + 1, U) to those."""
    inverse, values = _inverse(squares), (len(squares) - 1) // units
    fit = inverse @ products
    kept = torch.arange(units, device=squares.device)
    while len(kept) > keep:
        places = torch.arange(len(kept) * values, device=squares.device).view(len(kept), values)
        blocks = inverse[places[:, :, None], places[:, None, :]]  # (units, values, values)
        weights = fit[places]  # (units, values, U)
        shares = torch.linalg.solve(blocks, weights)
        out = int((weights * shares).sum((1, 2)).argmin())
        gone = places[out]
        rest = torch.cat([places[:out].flatten(), places[out + 1 :].flatten(), torch.tensor([len(fit) - 1], device=squares.device)])
        across = inverse[rest][:, gone]
        fit = fit[rest] - across @ shares[out]
        inverse = inverse[rest][:, rest] - across @ torch.linalg.solve(blocks[out], across.T)
        kept = torch.cat([kept[:out], kept[out + 1 :]])
    return kept, fit
