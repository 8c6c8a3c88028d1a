"""A long synthesis in parts: the arithmetic, and images that do not depend on who mines them or on interruptions."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedimpr.errors import ConfigError
from fedimpr.impressions import Impressions
from fedimpr.synthesis import Synthesizer
from fedimpr.synthesis.streams import Job, merged, mine_stream
from sim.federation import methods_of
from tests.makers import SHAPE, small_ensemble, small_model
from tests.sim.tiny import METHODS, tiny

JOBS = st.builds(Job, count=st.integers(1, 500), part_size=st.integers(1, 60), streams=st.integers(1, 9), seed=st.just(0))


@functools.cache
def unused(name: str) -> Synthesizer:
    return methods_of(tiny(Path("unused"), methods=[name]))[name].synthesizer


def synthesizer(name: str) -> Synthesizer:
    """A fresh one, shrunk."""
    return copy.deepcopy(unused(name))


def mined(made: Synthesizer, job: Job, stream: int, done: int = 0, **more) -> dict[int, Impressions]:
    return dict(mine_stream(made, small_ensemble(2), job, stream, shape=SHAPE, student=small_model(7), done=done, **more))


def straight(name: str, job: Job) -> Impressions:
    """All streams, one after another."""
    return merged({part: made for stream in range(job.streams) for part, made in mined(synthesizer(name), job, stream).items()})


def same(one: Impressions, two: Impressions) -> bool:
    tensors = [(getattr(one, key), getattr(two, key)) for key in ("images", "targets", "labels")]
    return all(torch.equal(a, b) for a, b in tensors) and one.teacher_passes == two.teacher_passes


@given(JOBS)
def test_every_part_belongs_to_one_stream_and_comes_in_order(job: Job) -> None:
    streams = [list(job.parts_of(stream)) for stream in range(job.streams)]
    assert sorted(part for parts in streams for part in parts) == list(range(job.parts))
    assert all(parts == sorted(parts) and {part % job.streams for part in parts} <= {stream} for stream, parts in enumerate(streams))


@given(JOBS)
def test_parts_are_full_but_for_the_last_and_make_the_count(job: Job) -> None:
    sizes = [job.size(part) for part in range(job.parts)]
    assert sum(sizes) == job.count
    assert set(sizes[:-1]) <= {job.part_size} and 1 <= sizes[-1] <= job.part_size


@pytest.mark.parametrize(("key", "value"), [("count", 0), ("part_size", 0), ("streams", 0), ("seed", -1)])
def test_a_number_out_of_range_is_refused(key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"'{key}' is {value}"):
        Job(**{"count": 10, "part_size": 5, "streams": 1, "seed": 0, key: value})


@pytest.mark.parametrize("stream", [-1, 2])
def test_a_stream_that_is_not_there_is_refused(stream: int) -> None:
    with pytest.raises(ConfigError, match=r"'stream' is -?\d; allowed: an integer in \[0, 2\)"):
        mined(synthesizer("di"), Job(count=8, part_size=2, streams=2, seed=0), stream)


def test_parts_are_merged_by_number_and_passes_are_summed() -> None:
    def part(value: float, count: int, passes: int) -> Impressions:
        images, targets = torch.full((count, 1, 2, 2), value), torch.full((count, 2), value)
        return Impressions(images, targets, torch.full((count,), round(10 * value)), passes)

    made = merged({10: part(0.3, 1, 5), 2: part(0.1, 2, 7)})
    assert made.labels.tolist() == [1, 1, 3]  # part 2 stands before part 10
    assert torch.equal(made.images[:, 0, 0, 0], torch.tensor([0.1, 0.1, 0.3])) and torch.equal(
        made.targets, made.images[:, 0, 0, :1].expand(3, 2)
    )
    assert made.teacher_passes == 12


def test_progress_says_which_part_it_is_about() -> None:
    told: list[object] = []
    mined(
        synthesizer("di"),
        Job(count=12, part_size=4, streams=2, seed=0),
        0,
        progress=lambda stage, done, total, part, **info: told.append(part),
    )
    assert told == [0, 0, 0, 2, 2, 2]  # three steps a part


@pytest.mark.parametrize("name", METHODS)
def test_neither_the_order_of_streams_nor_interruptions_matter(name: str) -> None:
    """The last stream first, and a fresh synthesizer for every part, which gets the state that the one before it left."""
    job, found = Job(count=22, part_size=8, streams=2, seed=3), {}  # parts of 8, 8 and 6; the first stream has two of them
    for stream in (1, 0):
        state: dict[str, torch.Tensor] = {}
        for part in job.parts_of(stream):
            made = synthesizer(name)
            made.load_state_dict(state)
            parts = mine_stream(made, small_ensemble(2), job, stream, shape=SHAPE, student=small_model(7), done=part)
            number, found[part] = next(parts)
            assert number == part
            state = copy.deepcopy(dict(made.state_dict()))
    assert same(merged(found), straight(name, job))
    assert not same(found[1], straight(name, Job(count=8, part_size=8, streams=1, seed=4)))


@pytest.mark.parametrize("name", METHODS)
def test_the_number_of_streams_matters_to_methods_with_memory_only(name: str) -> None:
    made = synthesizer(name)
    mined(made, Job(count=8, part_size=8, streams=1, seed=0), 0)
    one, two = (straight(name, Job(count=16, part_size=8, streams=streams, seed=0)) for streams in (1, 2))
    assert same(one, two) == (not made.state_dict())
