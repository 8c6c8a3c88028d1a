"""Randomness as an argument: every generator derives from (seed, purpose, round, partition).

Two parts of a run never share a stream, so the order in which clients, rounds or workers happen to run cannot change a result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(seed: int, purpose: str, round: int = 0, partition: int = 0) -> int:
    """A 63-bit seed for one purpose of one round of one partition: the head of a SHA-256 over the four."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{round}/{partition}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, purpose: str, round: int = 0, partition: int = 0) -> torch.Generator:
    """A CPU generator seeded with :func:`derive`."""
    return torch.Generator().manual_seed(derive(seed, purpose, round, partition))


def on_device(source: torch.Generator, device: torch.device) -> torch.Generator:
    """A generator on ``device`` that continues ``source``.

    On the source's own device this is ``source`` itself. Elsewhere a new generator is seeded with one draw from it, so that an inner loop
    draws its noise where it uses it and never waits for the host.
    """
    if device.type == source.device.type:
        return source
    return torch.Generator(device=device).manual_seed(draw_seed(source))


def draw_seed(source: torch.Generator) -> int:
    """One 63-bit seed drawn from ``source``, which advances."""
    return int(torch.randint(2**62, (), generator=source, device=source.device))


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Run a block under ``seed`` and give the global random state back afterwards.

    For what PyTorch offers no generator argument for: the initial weights of modules, and dropout.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        # ``torch.manual_seed`` also notes down a stack trace for each kind of device that has not been used yet, which a GPU-less run pays
        # for at every client's turn and never gives back.
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield
