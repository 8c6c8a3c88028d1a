"""The received client models as one teacher."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from fedimpr.errors import FedimprError, TeacherError
from fedimpr.models import Classifier, final_layer, rebuild
from fedimpr.observation import Features, Observation, observe_module, pass_of
from fedimpr.states import write

# Beyond this many members the activations of one gradient step are recomputed member by member in the backward pass, so that memory does
# not grow with the number of clients.
MEMBERS_IN_MEMORY = 16

# On a CPU, batching members pays up to this many pixels in a batch: see benchmarks/results/ensemble.
PIXELS_WORTH_BATCHING = 4096

Look = Callable[[nn.Module, Tensor], tuple[Tensor, ...]]


class Ensemble(nn.Module):
    """A teacher whose logits are the weighted mean of its members' logits, or the logarithm of the weighted mean of their probabilities.

    Of probabilities each member has one vote an image, however large its logits, which grow far from the data that it knows; a mean of
    logits is what the papers on distillation take, and is itself a linear final layer: over the concatenated features of all members, with
    the members' final layers, scaled by their weights, side by side. :func:`class_vectors` uses this.

    Args:
        members: M modules that map images (N, C, H, W) in [0, 1] to logits (N, K). They become the ensemble's own: eval mode, no gradients.
        weights: (M,) or (M, K), >= 0; normalised over members per class. ``None`` is uniform. A class that no member has any weight
            for is weighted uniformly.
        batched: compute equal architectures as one batched call. ``None`` decides by what ``benchmarks/ensemble.py`` measures: batched
            on an accelerator, and on a CPU where a batch has few pixels, so that calls cost more than arithmetic.
        mean: what it is the mean of.

    Raises:
        TeacherError: no members, an unknown mean, weights of a wrong shape or negative, or ``batched=True`` with unlike architectures.
    """

    weights: Tensor  # (M, K) or (M, 1), columns sum to one

    def __init__(
        self,
        members: Sequence[nn.Module],
        weights: Tensor | None = None,
        *,
        batched: bool | None = None,
        mean: Literal["logits", "probabilities"] = "logits",
    ) -> None:
        super().__init__()
        if mean not in ("logits", "probabilities"):
            raise TeacherError("an ensemble is a mean of logits or of probabilities", value=mean)
        if not members:
            raise TeacherError("an ensemble needs at least one member", value=0)
        self.members = nn.ModuleList(members).eval().requires_grad_(False)
        w = torch.ones(len(members), 1) if weights is None else weights.detach().float().reshape(len(weights), -1)
        if len(w) != len(members) or bool((w < 0).any()) or not bool(w.isfinite().all()):
            raise TeacherError("ensemble weights must be finite, >= 0 and one row a member", value=tuple(w.shape))
        total = w.sum(0, keepdim=True)
        self.register_buffer("weights", torch.where(total > 0, w / total.clamp_min(1e-30), torch.full_like(w, 1 / len(w))))
        self.alike = len({_shape(member) for member in members}) == 1
        if batched and not self.alike:
            raise TeacherError("members of unlike architecture cannot be batched", remedy="Pass batched=None.")
        self.batched, self.mean = batched, mean
        self._stacked: tuple[dict[str, Tensor], dict[str, Tensor], nn.Module] | None = None

    def __len__(self) -> int:
        return len(self.members)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W) in [0, 1]."""
        return self.observe(images).logits

    def member_logits(self, images: Tensor) -> Tensor:
        """Every member's logits, (M, N, K)."""
        return self._each(lambda member, x: (member(x),), images)[0]

    def observe(
        self, images: Tensor, *, statistics: bool = False, features: Features | None = None, counted: int | None = None
    ) -> Observation:
        """As :func:`fedimpr.observation.observe`; the members' statistics and features follow each other."""

        def look(member: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(passes(member, x, statistics=statistics, features=features, counted=counted))

        batched = self._runs_batched(images)
        passes = observe_module if batched else pass_of()
        if batched:
            logits, taken, seen = self._each(look, images)
            total = (self.weights[:, None] * self._votes(logits)).sum(0)
            return Observation(self._met(total), taken.transpose(0, 1).flatten(1), seen.transpose(0, 1).flatten(1))
        # One running sum instead of a stack of M: the members' logits need not be alive together.
        logits, parts, features_of = images.new_zeros(()), [], []
        for weight, member in zip(self.weights, self.members, strict=True):
            z, s, f = self._one(look, member, images)
            logits = logits + weight * self._votes(z)
            parts.append(s)
            features_of.append(f)
        return Observation(self._met(logits), torch.cat(parts, 1), torch.cat(features_of, 1))

    def _votes(self, logits: Tensor) -> Tensor:
        """What is added up."""
        return logits.softmax(-1) if self.mean == "probabilities" else logits

    def _met(self, total: Tensor) -> Tensor:
        """Logits of the sum."""
        return total.clamp_min(torch.finfo(total.dtype).tiny).log() if self.mean == "probabilities" else total

    def _runs_batched(self, images: Tensor) -> bool:
        if not self.alike or len(self) == 1 or self.batched is not None:
            return bool(self.batched)
        return images.device.type != "cpu" or len(images) * images.shape[2] * images.shape[3] <= PIXELS_WORTH_BATCHING

    def _each(self, look: Look, images: Tensor) -> tuple[Tensor, ...]:
        """Apply ``look`` to all members and stack each of its results along a new first axis M."""
        if not self._runs_batched(images):
            rows = [self._one(look, member, images) for member in self.members]
            return tuple(torch.stack(column) for column in zip(*rows, strict=True))
        if self._stacked is None:
            parameters, buffers = stack_module_state(list(self.members))
            self._stacked = ({k: v.detach() for k, v in parameters.items()}, buffers, copy.deepcopy(self.members[0]))
        parameters, buffers, template = self._stacked

        def one(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
            tensors = {f"member.{name}": tensor for name, tensor in {**p, **b}.items()}
            out: tuple[Tensor, ...] = functional_call(_Looked(template, look), tensors, (x,))
            return out

        return tuple(vmap(one, in_dims=(0, 0, None))(parameters, buffers, images))

    def _one(self, look: Look, member: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
        if len(self) > MEMBERS_IN_MEMORY and torch.is_grad_enabled() and images.requires_grad:
            out: tuple[Tensor, ...] = checkpoint(look, member, images, use_reentrant=False, preserve_rng_state=False)
            return out
        return look(member, images)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._stacked = None  # moved or cast: stack again
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def save(self, path: str | Path) -> None:
        """Write weights and architectures to one safetensors file.

        Raises:
            FedimprError: the file cannot be written, or a member was not made by :func:`fedimpr.models.build` and has no named
                architecture.
        """
        specs = []
        for index, member in enumerate(self.members):
            if not isinstance(member, Classifier):
                raise FedimprError(f"member {index} is no fedimpr Classifier", stage="saving the ensemble", remedy="Use Ensemble.export.")
            specs.append(member.spec)
        metadata = {"format": "pt", "kind": "fedimpr.ensemble", "members": json.dumps(specs), "mean": self.mean}
        try:
            write(path, self.state_dict(), metadata)
        except OSError as error:
            problem = f"cannot write {path}: {error.strerror or error}"
            raise FedimprError(problem, stage="saving the ensemble", remedy="Free some space.") from error

    @classmethod
    def load(cls, path: str | Path) -> Ensemble:
        """Read what :meth:`save` wrote.

        Raises:
            FedimprError: the file is missing, damaged or holds something else.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                noted = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            members, mean = [rebuild(spec) for spec in json.loads(noted["members"])], noted.get("mean", "logits")
            ensemble = cls(members, tensors["weights"], mean=mean)
            ensemble.load_state_dict(tensors)
        except Exception as error:
            raise FedimprError(f"{path} is no ensemble file: {error}", stage="loading the ensemble") from error
        return ensemble

    def export(self, path: str | Path, shape: tuple[int, int, int]) -> None:
        """Write a ``torch.export`` program (``.pt2``) that maps images (N, C, H, W) to logits for any N, without this package.

        Args:
            path: where to write.
            shape: (C, H, W) of the images.
        """
        example = torch.zeros(2, *shape, device=self.weights.device)
        chosen, self.batched = self.batched, False  # in turn: the choice by size would fix the batch
        try:
            program = torch.export.export(self, (example,), dynamic_shapes=({0: torch.export.Dim("N")},))
        finally:
            self.batched = chosen
        torch.export.save(program, str(path))


class _Looked(nn.Module):
    """A module whose forward is ``look(member, images)``: ``functional_call`` swaps the member's tensors and its hooks still fire."""

    def __init__(self, member: nn.Module, look: Look) -> None:
        super().__init__()
        self.member, self.look = member, look

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.look(self.member, images)


def class_vectors(teacher: nn.Module) -> Tensor:
    """The vector that the final layer keeps for each class, (K, F); biases are left out (ZSKD).

    For an ensemble the final layer is the one it really has: the mean of logits is linear in the members' concatenated features, so the
    vector of class k is the concatenation over members m of ``weights[m, k] * W_m[k]``.

    Raises:
        TeacherError: the teacher has no final linear layer.
    """
    if isinstance(teacher, Ensemble):
        if teacher.mean != "logits":
            raise TeacherError("a mean of probabilities has no final linear layer", remedy="Take the ensemble of logits.")
        pairs = zip(teacher.weights, teacher.members, strict=True)
        return torch.cat([weight[:, None] * final_layer(member).weight.detach() for weight, member in pairs], 1)
    return final_layer(teacher).weight.detach()


def _shape(member: nn.Module) -> str:
    """Equal for modules that can share one batched computation: same structure, same tensors."""
    return repr(member) + repr([(name, tuple(t.shape), t.dtype) for name, t in member.state_dict().items()])
