"""Streams of tasks, who works on them, and how their images are dealt."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedimpr.continual.stream import (
    ClassIncremental,
    DomainIncremental,
    Scenario,
    Share,
    Stream,
    Task,
    attendance,
    cut,
    deal_task,
)
from fedimpr.data import Dataset, Images
from fedimpr.data.partition import ByDomain, DirichletPerClass, DirichletPerClient, Iid, Partition, Quantity, Recipe, Shards
from fedimpr.errors import ConfigError, DataError, PartitionError

DOMAINS = ("art", "photo", "sketch")


def labelled(count: int, classes: int = 10, seed: int = 0) -> Images:
    """Images without content; every class and every domain has some, in disorder."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    domains = (torch.arange(count) // classes % len(DOMAINS))[order]
    pixels = torch.zeros(count, 1, 1, 1, dtype=torch.uint8)
    return Images(pixels, (torch.arange(count) % classes)[order], tuple("abcdefghij"[:classes]), domains, DOMAINS)


def toy(train: int = 300, test: int = 60, classes: int = 10) -> Dataset:
    return Dataset("toy", labelled(train, classes), labelled(test, classes, 1))


def without_domains(images: Images) -> Images:
    return Images(images.pixels, images.labels, images.classes)


FIVE = ClassIncremental(tasks=5, order=None)
RECIPES = [Iid(), DirichletPerClass(alpha=0.5), DirichletPerClient(alpha=0.1), Shards(per_client=2), Quantity(alpha=0.5), ByDomain()]
IN_STEP = attendance(5, joins=(0,) * 4, behind=(0,) * 4)


# --- Streams ---


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Of either kind, for ten classes: sizes that are equal or given, orders that are drawn or given."""
    if draw(st.booleans()):
        return DomainIncremental(order=draw(st.none() | st.permutations(DOMAINS).map(tuple)))
    ends = sorted(draw(st.sets(st.integers(1, 9)))) + [10]
    sizes = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
    tasks = draw(st.sampled_from([1, 2, 5, 10]) | st.just(sizes))
    return ClassIncremental(tasks=tasks, order=draw(st.none() | st.permutations(range(10)).map(tuple)))


@settings(max_examples=30)
@given(scenario=scenarios(), seed=st.integers(0, 2**62))
def test_every_image_is_in_one_task_and_the_same_seed_gives_the_same_stream(scenario: Scenario, seed: int) -> None:
    data = toy()
    stream, again = (cut(scenario, data, seed=seed) for _ in range(2))
    for images, parts in ((data.train, [t.train for t in stream.tasks]), (data.test, [t.test for t in stream.tasks])):
        assert sorted(torch.cat(parts).tolist()) == list(range(len(images)))
        assert all(part.dtype == torch.int64 and part.tolist() == sorted(part.tolist()) and len(part) for part in parts)
    assert stream.manifest == again.manifest
    seen: set[int] = set()
    for number, task in enumerate(stream.tasks):
        labels = set(data.train.labels[task.train].tolist())
        assert task.number == number
        assert task.new == tuple(sorted(labels - seen))
        seen |= labels
        assert task.seen == tuple(sorted(seen))
    assert seen == set(range(10))


def test_no_class_is_in_two_tasks() -> None:
    data, stream = toy(), cut(FIVE, toy(), seed=3)
    assert [len(task.new) for task in stream.tasks] == [2] * 5
    assert len({k for task in stream.tasks for k in task.new}) == 10
    for task in stream.tasks:
        assert set(data.train.labels[task.train].tolist()) == set(data.test.labels[task.test].tolist()) == set(task.new)
        assert (len(task.train), len(task.test)) == (60, 12)  # a fifth of 300 and of 60


def test_given_sizes_and_order_decide_who_comes_when() -> None:
    stream = cut(ClassIncremental(tasks=(1, 3), order=(2, 3, 0, 1)), toy(classes=4), seed=0)
    assert [(task.name, task.new, task.seen) for task in stream.tasks] == [("c", (2,), (2,)), ("d, a, b", (0, 1, 3), (0, 1, 2, 3))]
    other = cut(ClassIncremental(tasks=(1, 3), order=(2, 3, 0, 1)), toy(classes=4), seed=1)
    assert other.manifest["sha256"] == stream.manifest["sha256"]  # nothing is left to draw


def test_another_seed_draws_another_order() -> None:
    assert len({cut(FIVE, toy(), seed=seed).manifest["sha256"] for seed in range(8)}) == 8
    orders = {tuple(task.name for task in cut(DomainIncremental(order=None), toy(), seed=seed).tasks) for seed in range(40)}
    assert len(orders) == 6  # all that three domains have


def test_a_domain_is_a_task_and_its_classes_come_back() -> None:
    data = toy()
    stream = cut(DomainIncremental(order=("sketch", "art", "photo")), data, seed=0)
    assert data.train.domains is not None and data.test.domains is not None
    for task, domain in zip(stream.tasks, (2, 0, 1), strict=True):
        assert task.name == DOMAINS[domain]
        assert set(data.train.domains[task.train].tolist()) == set(data.test.domains[task.test].tolist()) == {domain}
    everything = tuple(range(10))
    assert [task.new for task in stream.tasks] == [everything, (), ()]
    assert [task.seen for task in stream.tasks] == [everything] * 3


def test_manifest_says_what_was_cut() -> None:
    scenario = ClassIncremental(tasks=(4, 6), order=None)
    stream = cut(scenario, toy(), seed=7)
    manifest = json.loads(json.dumps(stream.manifest))
    assert manifest == stream.manifest
    expected = {"dataset": "toy", "scenario": "class_incremental", "parameters": {"tasks": [4, 6], "order": None}, "seed": 7}
    assert {key: manifest[key] for key in expected} == expected
    assert [(t["name"], tuple(t["new"]), t["train"], t["test"]) for t in manifest["tasks"]] == [
        (t.name, t.new, len(t.train), len(t.test)) for t in stream.tasks
    ]
    parts = [part.tolist() for task in stream.tasks for part in (task.train, task.test)]
    assert manifest["sha256"] == digest(parts)


def digest(parts: list[list[int]]) -> str:
    """Little-endian 64-bit: size, then indices, part after part."""
    return hashlib.sha256(b"".join(struct.pack(f"<{len(part) + 1}q", len(part), *part) for part in parts)).hexdigest()


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 1, 2, 2), (0, 1, 2, 4), (0, 1, 2, 3, 3)])
def test_a_class_order_must_name_each_class_once(order: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="'order' is .*; allowed: each of 0, 1, 2, 3 once"):
        cut(ClassIncremental(tasks=2, order=order), toy(classes=4), seed=0)


@pytest.mark.parametrize("order", [("art",), ("art", "photo", "photo"), ("art", "photo", "clipart")])
def test_a_domain_order_must_name_each_domain_once(order: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="'order' is .*; allowed: each of art, photo, sketch once"):
        cut(DomainIncremental(order=order), toy(), seed=0)


@pytest.mark.parametrize("tasks", [0, -2, 3, 20])
def test_equal_tasks_must_divide_the_classes(tasks: int) -> None:
    with pytest.raises(ConfigError, match=f"'tasks' is {tasks}; allowed: a number that divides the 10 classes, or a list"):
        cut(ClassIncremental(tasks=tasks, order=None), toy(), seed=0)


@pytest.mark.parametrize("tasks", [(5, 4), (5, 6), (10, 0), (11, -1), ()])
def test_task_sizes_must_add_up_and_no_task_is_empty(tasks: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=rf"'tasks' is .*>= 1 that add up to the 10 classes \(here {sum(tasks)}\)"):
        cut(ClassIncremental(tasks=tasks, order=None), toy(), seed=0)


def test_data_without_domains_has_no_domain_tasks() -> None:
    data = toy()
    for bare in (replace(data, train=without_domains(data.train)), replace(data, test=without_domains(data.test))):
        with pytest.raises(DataError, match="toy has no domains to make tasks of. Choose other tasks, or"):
            cut(DomainIncremental(order=None), bare, seed=0)


def test_every_task_needs_images_to_learn_from_and_to_be_tested_on() -> None:
    data, order = toy(), ("art", "sketch", "photo")
    for part, images in (("training", data.train), ("test", data.test)):
        assert images.domains is not None
        short = images.subset((images.domains != 2).nonzero().flatten())
        lacking = replace(data, train=short) if part == "training" else replace(data, test=short)
        with pytest.raises(DataError, match=rf"task 1 \(sketch\): there is no {part} image. Give every task images"):
            cut(DomainIncremental(order=order), lacking, seed=0)


def test_a_test_class_that_nobody_has_seen_is_refused() -> None:
    data = toy(classes=4)
    lacking = replace(data, train=data.train.subset((data.train.labels != 3).nonzero().flatten()))
    with pytest.raises(DataError, match=r"task 1 \(c, d\): there are test images, but no training image so far, of class 3 \(d\)"):
        cut(ClassIncremental(tasks=2, order=(0, 1, 2, 3)), lacking, seed=0)


@pytest.mark.parametrize(("first", "part"), [(([0, 1], [0]), "training"), (([0, 1, 2, 2], [0]), "training"), (([0, 1, 2], []), "test")])
def test_a_scenario_that_loses_or_doubles_an_image_is_caught(first: tuple[list[int], list[int]], part: str) -> None:
    class HalfDone:
        def __call__(self, data: Dataset, *, seed: int) -> list[Share]:
            return [Share("only", *(torch.tensor(places, dtype=torch.int64) for places in first))]

    with pytest.raises(DataError, match=f"half_done does not put every {part} image of toy into exactly one task"):
        cut(HalfDone(), toy(3, 1, 3), seed=0)


# --- Who works on what ---


def test_clients_may_join_late_and_be_behind() -> None:
    # Client 0 is always there, 1 joins with task 2, 2 is a task behind, 3 joins with task 1 and is a task behind: it has that in step 2.
    assert attendance(4, joins=(0, 2, 0, 1), behind=(0, 0, 1, 1)) == (
        (0, None, None, None),
        (1, None, 0, None),
        (2, 2, 1, 1),
        (3, 3, 2, 2),
    )


@settings(max_examples=40)
@given(data=st.data(), tasks=st.integers(1, 8), clients=st.integers(1, 6))
def test_a_client_has_one_task_after_the_other_and_no_step_and_no_task_is_without_client(
    data: st.DataObject, tasks: int, clients: int
) -> None:
    behind = [0, *(data.draw(st.integers(0, tasks - 1)) for _ in range(clients - 1))]
    joins = [0, *(data.draw(st.integers(0, tasks - 1 - lag)) for lag in behind[1:])]
    steps = attendance(tasks, joins=joins, behind=behind)
    assert len(steps) == tasks and all(len(step) == clients for step in steps)
    for client, (first, lag) in enumerate(zip(joins, behind, strict=True)):
        worked = [(t, step[client]) for t, step in enumerate(steps) if step[client] is not None]
        assert worked == [(task + lag, task) for task in range(first, tasks - lag)] != []
    assert all(any(task is not None for task in step) for step in steps)
    assert {task for step in steps for task in step} - {None} == set(range(tasks))


@pytest.mark.parametrize(
    ("joins", "behind", "message"),
    [
        ((0, 0), (0,), r"'behind' is \[0\]; allowed: 2 whole numbers, one a client"),
        ((0, 3), (0, 0), r"'joins\[1\]' is 3; allowed: 0 to 2, for a client that is 0 of 3 tasks behind"),
        ((0, 2), (0, 1), r"'joins\[1\]' is 2; allowed: 0 to 1, for a client that is 1 of 3 tasks behind"),
        ((0, -1), (0, 0), r"'joins\[1\]' is -1"),
        ((0, 0), (0, 3), r"'behind\[1\]' is 3; allowed: 0 to 2, as there are 3 tasks"),
        ((0, 0), (0, -1), r"'behind\[1\]' is -1"),
        ((1, 0), (0, 1), r"'joins' is \[1, 0\]; allowed: 0 for a client that is not behind"),
        ((), (), r"'joins' is \[\]"),
    ],
)
def test_nobody_may_be_without_a_task_and_no_step_without_a_client(joins: tuple[int, ...], behind: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attendance(3, joins=joins, behind=behind)


# --- Dealing ---


def dealt(
    recipe: Recipe, stream: Stream, number: int, *, steps: tuple[tuple[int | None, ...], ...] = IN_STEP, minimum: int = 1, seed: int = 0
) -> Partition:
    return deal_task(recipe, toy().train, stream.tasks[number], attendance=steps, minimum=minimum, seed=seed, dataset="toy")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_a_tasks_images_all_go_to_clients(recipe: Recipe) -> None:
    stream, three = cut(FIVE, toy(), seed=0), attendance(5, joins=(0,) * 3, behind=(0,) * 3)
    for task in stream.tasks:
        partition = dealt(recipe, stream, task.number, steps=three)
        assert sum(partition.manifest["sizes"]) == 60  # 6 shards of 10 leave none over
        assert sorted(torch.cat(partition.indices).tolist()) == task.train.tolist()
        assert partition.manifest == dealt(recipe, stream, task.number, steps=three).manifest


def test_each_task_and_each_seed_is_dealt_by_a_draw_of_its_own() -> None:
    data = toy()
    whole = Task(0, "all", torch.arange(300), torch.arange(60), tuple(range(10)), tuple(range(10)))
    hashes = {
        deal_task(Iid(), data.train, replace(whole, number=number), attendance=IN_STEP, minimum=1, seed=seed, dataset="toy").manifest[
            "sha256"
        ]
        for number in range(3)
        for seed in range(3)
    }
    assert len(hashes) == 9


def test_only_clients_that_work_on_a_task_get_its_images() -> None:
    stream = cut(FIVE, toy(), seed=0)
    steps = attendance(5, joins=(0, 2, 0), behind=(0, 0, 1))
    # Client 1 joins with task 2; client 2 is still at task 3 when the stream ends. A task has 60 images.
    sizes = [dealt(Iid(), stream, number, steps=steps).manifest["sizes"] for number in range(5)]
    assert sizes == [[30, 0, 30], [30, 0, 30], [20, 20, 20], [20, 20, 20], [30, 30, 0]]


def test_manifest_says_what_was_dealt_of_which_task() -> None:
    data, stream = toy(), cut(FIVE, toy(), seed=0)
    partition = dealt(DirichletPerClient(alpha=0.5), stream, 1, steps=attendance(5, joins=(2, 0, 0), behind=(0, 0, 0)), minimum=2, seed=9)
    manifest = json.loads(json.dumps(partition.manifest))
    assert manifest == partition.manifest
    expected = {"dataset": "toy", "recipe": "dirichlet_per_client", "parameters": {"alpha": 0.5}, "seed": 9, "minimum": 2}
    expected |= {"clients": 3, "task": 1, "members": [1, 2], "sizes": [0, 30, 30]}
    assert {key: manifest[key] for key in expected} == expected
    assert manifest["counts"] == [data.train.subset(indices).counts().tolist() for indices in partition.indices]
    assert manifest["sha256"] == digest([sorted(indices.tolist()) for indices in partition.indices])
    assert manifest.keys() == expected.keys() | {"counts", "sha256"}


def test_what_does_not_fit_names_the_task() -> None:
    stream = cut(ClassIncremental(tasks=5, order=tuple(range(10))), toy(), seed=0)
    with pytest.raises(ConfigError, match=r"'clients' is 4; allowed: 1 to 3, as 60 images give 20 to each, in task 1 \(c, d\)"):
        dealt(Iid(), stream, 1, minimum=20)
    with pytest.raises(
        PartitionError, match=r"task 2 \(e, f\), dealing by shards, per_client 2: no draw gave each of 4 clients its minimum of 15"
    ):
        dealt(Shards(per_client=2), stream, 2, minimum=15)
