"""Impressions: synthetic images, the soft targets that go with them, and where they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fedimpr.errors import FedimprError
from fedimpr.states import from_note, to_note


@dataclass(frozen=True)
class Source:
    """Where impressions came from.

    Attributes:
        teacher: what was mined, e.g. ``"ensemble of 10"``.
        method: name of the synthesizer.
        round: federated round, counted from 1; 0 outside a federation.
        seed: seed of the run.
    """

    teacher: str
    method: str
    round: int
    seed: int


@dataclass(frozen=True)
class Impressions:
    """A batch of impressions.

    Attributes:
        images: (N, C, H, W) float32 in [0, 1].
        targets: (N, K) soft targets, rows sum to one: the teacher's softmax at the synthesizer's temperature.
        labels: (N,) int64, the class each image was asked to show.
        teacher_passes: images that went through the teacher to make these (an ensemble of M counts once).
        note: what a reader of results must know about how they were made, in a few words; empty where there is nothing.

    Raises:
        FedimprError: shapes disagree, a value is not finite, or a pixel lies outside [0, 1].
    """

    images: Tensor
    targets: Tensor
    labels: Tensor
    teacher_passes: int
    note: str = ""

    def __post_init__(self) -> None:
        n = len(self.images)
        if self.images.dim() != 4 or self.targets.dim() != 2 or self.labels.shape != (n,) or len(self.targets) != n:
            shapes = tuple(tuple(t.shape) for t in (self.images, self.targets, self.labels))
            raise FedimprError("impressions need images (N, C, H, W), targets (N, K) and labels (N,)", stage="synthesis", value=shapes)
        if n and not bool(self.images.isfinite().all() & self.targets.isfinite().all()):
            raise FedimprError("impressions are not finite", stage="synthesis", remedy="Lower the synthesizer's learning rate.")
        if n and not (float(self.images.min()) >= 0 and float(self.images.max()) <= 1):
            span = (float(self.images.min()), float(self.images.max()))
            raise FedimprError("impressions leave the range [0, 1]", stage="synthesis", value=span)

    def __len__(self) -> int:
        return len(self.images)


class Sample(NamedTuple):
    """Impressions drawn from a bank.

    Attributes:
        images: (N, C, H, W) float32 in [0, 1].
        places: (N,) int64, where in :attr:`Bank.images` they stand.
    """

    images: Tensor
    places: Tensor


class Bank:
    """The bounded memory that holds impressions over batches, rounds and tasks: first in, first out, on the device of what it is given.

    Pixels are held as 8-bit integers, a quarter of the memory, and come out as multiples of 1 / 255: what a picture file would hold, and
    the resolution that the teacher's own training images had.

    Args:
        capacity: how many impressions it holds at most, >= 1.

    Attributes:
        sources: where all that it was given came from.
        notes: the distinct notes that came with it, see :class:`Impressions`.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise FedimprError("a bank must hold at least one impression", value=capacity)
        self.capacity = capacity
        self.added = 0
        self.sources: list[Source] = []
        self.notes: list[str] = []
        self._rows: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, impressions: Impressions, source: Source) -> None:
        """Take impressions in; the oldest leave once the capacity is reached.

        They may be of more classes than those that are held, whose targets then say 0 of the new ones.
        """
        if source not in self.sources:
            self.sources.append(source)
        if impressions.note and impressions.note not in self.notes:
            self.notes.append(impressions.note)
        origin = torch.full_like(impressions.labels, self.sources.index(source))
        new = {"images": impressions.images, "targets": impressions.targets, "labels": impressions.labels, "origins": origin}
        new = {key: rows[-self.capacity :].detach() for key, rows in new.items()}
        new["images"] = (new["images"] * 255).round().to(torch.uint8)
        count = len(new["labels"])
        if not self._rows:
            self._rows = {key: rows.new_zeros(self.capacity, *rows.shape[1:]) for key, rows in new.items()}
        if (missing := new["targets"].shape[1] - self._rows["targets"].shape[1]) > 0:
            self._rows["targets"] = F.pad(self._rows["targets"], (0, missing))
        places = torch.arange(self.added, self.added + count, device=impressions.images.device) % self.capacity
        for key, rows in new.items():
            self._rows[key][places] = rows
        self.added += count

    def thin(self, most: int) -> None:
        """Keep the first ``most`` impressions of each class from each source; the others leave."""
        if not len(self):
            return
        kept = (place_in_group(self._groups()) < most).nonzero().flatten()
        for rows in self._rows.values():
            rows[: len(kept)] = rows[kept]
        self.added = len(kept)

    @property
    def groups(self) -> int:
        """How many pairs of a class and a source there are among what is held."""
        return len(self._groups().unique()) if len(self) else 0

    def _groups(self) -> Tensor:
        """A number for each pair of class and source, (len(self),)."""
        return self.labels * len(self.sources) + self._rows["origins"][: len(self)]

    def sample(self, count: int, generator: torch.Generator) -> Sample:
        """Draw ``count`` impressions with replacement.

        Raises:
            FedimprError: the bank is empty.
        """
        if not len(self):
            raise FedimprError("the bank is empty", stage="distillation", remedy="Add impressions before drawing from it.")
        pixels = self._rows["images"]
        places = torch.randint(len(self), (count,), generator=generator).to(pixels.device)
        return Sample(pixels[places].float() / 255, places)

    @property
    def pixels(self) -> Tensor:
        """All held images as they are held, (len(self), C, H, W) uint8."""
        return self._rows["images"][: len(self)]

    @property
    def images(self) -> Tensor:
        """All held images, (len(self), C, H, W) float32: a copy, four times the memory that they are held in."""
        return self.pixels.float() / 255

    @property
    def targets(self) -> Tensor:
        """All held soft targets, (len(self), K)."""
        return self._rows["targets"][: len(self)]

    @property
    def labels(self) -> Tensor:
        """The wanted classes of all held images, (len(self),)."""
        return self._rows["labels"][: len(self)]

    def source_of(self, place: int) -> Source:
        """Where the image at ``place`` in :attr:`images` came from."""
        return self.sources[int(self._rows["origins"][place])]

    def came_from(self, source: Source) -> Tensor:
        """Which of the held images came from a source, (len(self),) bool."""
        return self._rows["origins"][: len(self)] == self.sources.index(source)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a later run needs to go on, as tensors (sources and notes as JSON in bytes)."""
        sources = [asdict(source) for source in self.sources]
        note = to_note({"added": self.added, "capacity": self.capacity, "sources": sources, "notes": self.notes})
        held = {key: rows[: len(self)].clone() for key, rows in self._rows.items()}
        return {**held, "note": note}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave; the capacity becomes the saved one."""
        note = from_note(state["note"])
        self.capacity, self.added = note["capacity"], note["added"]
        self.sources = [Source(**source) for source in note["sources"]]
        self.notes = list(note.get("notes", []))
        self._rows = {}
        for key, rows in state.items():
            if key != "note":
                self._rows[key] = rows.new_zeros(self.capacity, *rows.shape[1:])
                self._rows[key][: len(rows)] = rows


def place_in_group(groups: Tensor) -> Tensor:
    """How many before it are of the same group, (N,), for each of the groups' numbers (N,), which are >= 0."""
    order = groups.argsort(stable=True)
    ranked = groups[order]
    places = torch.empty_like(groups)
    places[order] = torch.arange(len(groups), device=groups.device) - torch.searchsorted(ranked, ranked)
    return places
