"""A long synthesis in parts, whose images do not depend on who mines them, or on interruptions.

Parts are dealt to streams. A stream mines its parts in order with one synthesizer, so a method with memory has one memory a stream, and
each part draws from a generator of its own. So a part's images depend on the seed, the method, the models and the arithmetic of
:class:`Job` only. For methods without memory they do not even depend on the number of streams.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fedimpr import seeds
from fedimpr.errors import ConfigError
from fedimpr.impressions import Impressions
from fedimpr.synthesis.base import Progress, Synthesizer, require, silent


@dataclass(frozen=True, kw_only=True)
class Job:
    """How many images are mined, and in what parts.

    Attributes:
        count: images in all, >= 1.
        part_size: images of a part, >= 1; the last part holds what is left.
        streams: how many sequences of parts there are, >= 1: part p belongs to stream ``p % streams``.
        seed: of all randomness, >= 0.

    Raises:
        ConfigError: a number is out of range.
    """

    count: int
    part_size: int
    streams: int
    seed: int

    def __post_init__(self) -> None:
        require(self, above_zero=("count", "part_size", "streams"), at_least_zero=("seed",))

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return -(-self.count // self.part_size)

    def size(self, part: int) -> int:
        """How many images the part is asked for, in [1, ``part_size``]."""
        return min(self.part_size, self.count - part * self.part_size)

    def parts_of(self, stream: int) -> range:
        """The parts of a stream, in the order in which they are mined; the first one has the stream's own number.

        Raises:
            ConfigError: there is no such stream.
        """
        if not 0 <= stream < self.streams:
            raise ConfigError("stream", stream, f"an integer in [0, {self.streams})")
        return range(stream, self.parts, self.streams)


def mine_stream(
    synthesizer: Synthesizer,
    teacher: nn.Module,
    job: Job,
    stream: int,
    *,
    shape: tuple[int, int, int],
    student: nn.Module | None,
    done: int,
    progress: Progress = silent,
) -> Iterator[tuple[int, Impressions]]:
    """Mine the parts of one stream, one after another.

    While a part is handed over, ``synthesizer.state_dict()`` is what the stream's next part starts from.

    Args:
        synthesizer: fresh, or with the state in which the part before ``done`` left it.
        teacher: maps images (N, C, H, W) in [0, 1] to logits (N, K).
        job: the whole synthesis.
        stream: which of its streams.
        shape: (C, H, W) of the images.
        student: for adversarial methods, else ``None`` will do.
        done: the first part still to mine; parts below it are left out.
        progress: told after every step, with the part as ``part``.

    Yields:
        The number of a part, and its impressions.
    """
    for part in job.parts_of(stream):
        if part >= done:
            random = seeds.generator(job.seed, "mining", round=part)
            told = functools.partial(progress, part=part)
            yield part, synthesizer.synthesize(teacher, job.size(part), random, shape=shape, student=student, progress=told)


def merged(parts: Mapping[int, Impressions]) -> Impressions:
    """One or more parts, by number, as one: images in the order of the parts, teacher passes summed, notes joined."""
    ordered = [parts[part] for part in sorted(parts)]
    return Impressions(
        torch.cat([part.images for part in ordered]),
        torch.cat([part.targets for part in ordered]),
        torch.cat([part.labels for part in ordered]),
        sum(part.teacher_passes for part in ordered),
        "; ".join(dict.fromkeys(part.note for part in ordered if part.note)),
    )
