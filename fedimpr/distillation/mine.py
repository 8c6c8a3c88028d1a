"""Mining without a student."""

from __future__ import annotations

import torch
from torch import nn

from fedimpr.distillation.distil import Mining
from fedimpr.impressions import Bank, Source
from fedimpr.synthesis.base import Progress, Synthesizer, silent


def mine(
    teacher: nn.Module,
    synthesizer: Synthesizer,
    *,
    mining: Mining,
    bank: Bank,
    source: Source,
    shape: tuple[int, int, int],
    generator: torch.Generator,
    progress: Progress = silent,
) -> int:
    """Mine all of a method's impressions of a teacher into ``bank``: those before the first portion, then the portions.

    Args:
        teacher: maps images to logits; left as it was found.
        synthesizer: the method that mines; terms that look at a student are left out.
        mining: how many impressions, and in how many calls of the synthesizer.
        bank: takes them.
        source: written beside them.
        shape: (C, H, W).
        generator: the source of all randomness.
        progress: told after every step.

    Returns:
        How many images went through the teacher.
    """
    rest, portions = mining.images - mining.before, mining.portions
    ends = [mining.before + rest * (portion + 1) // portions for portion in range(portions)]
    counts = [end - start for start, end in zip([mining.before, *ends], ends, strict=False)]
    passes = 0
    for count in (mining.before, *counts):
        if count:
            impressions = synthesizer.synthesize(teacher, count, generator, shape=shape, progress=progress)
            bank.add(impressions, source)
            passes += impressions.teacher_passes
    return passes
