"""Randomness as an argument."""

from __future__ import annotations

import hashlib

import torch

from fedimpr import seeds


def test_a_seed_is_the_head_of_a_hash_of_its_purpose() -> None:
    digest = hashlib.sha256(b"3/training/2/7").hexdigest()
    assert seeds.derive(3, "training", 2, 7) == int(digest[:16], 16) // 2
    others = {seeds.derive(s, p, r, c) for s in (0, 1) for p in ("a", "b") for r in (0, 1) for c in (0, 1)}
    assert len(others) == 16


def test_isolated_repeats_and_leaves_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    draws = []
    for _ in range(2):
        with seeds.isolated(5):
            draws.append(torch.rand(3))
    assert torch.equal(*draws) and torch.equal(before, torch.get_rng_state())


def test_a_generator_on_its_own_device_is_itself() -> None:
    source = seeds.generator(0, "x")
    assert seeds.on_device(source, torch.device("cpu")) is source


def test_isolated_draws_what_pytorchs_own_seed_draws() -> None:
    with seeds.isolated(5):
        drawn = torch.rand(3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        assert torch.equal(torch.rand(3), drawn)


def test_isolated_leaves_nothing_behind_for_devices_that_are_not_used() -> None:
    """``torch.manual_seed`` notes a call down for the day on which a GPU is first used: one more a client's turn."""
    if torch.cuda.is_initialized():
        return
    waiting = len(torch.cuda._queued_calls)
    with seeds.isolated(5):
        pass
    assert len(torch.cuda._queued_calls) == waiting
