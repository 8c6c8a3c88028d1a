"""Which client works on which images in which round."""

from __future__ import annotations

import pytest
import torch

from fedimpr.continual.course import Course, plan_course
from fedimpr.continual.stream import ClassIncremental, DomainIncremental
from fedimpr.data import Dataset, Images
from fedimpr.data.partition import Iid
from fedimpr.errors import ConfigError


def images(count: int) -> Images:
    """Each pixel is its image's number, so that an image can be told by it; classes a to d and domains x and y in turn."""
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    return Images(pixels, torch.arange(count) % 4, tuple("abcd"), torch.arange(count) // 4 % 2, ("x", "y"))


DATA = Dataset("toy", images(160), images(40))


def course(scenario=ClassIncremental(tasks=2, order=(3, 1, 0, 2)), **other) -> Course:  # noqa: B008
    given = {"clients": 3, "rounds": 2, "joins": None, "behind": None, "minimum": 1, "seed": 0}
    return plan_course(scenario, DATA, Iid(), **(given | other))


def test_classes_are_numbered_as_they_arrive_and_images_keep_theirs() -> None:
    """The order is d, b, then a, c. Image 0 shows an a, which is now class 2 and was 0; image 3 shows a d, now class 1."""
    planned = course()
    assert planned.data.train.classes == ("b", "d", "a", "c")  # those that arrive together are in their old order
    assert planned.order == (1, 3, 0, 2)  # their old numbers
    assert planned.data.train.labels[:4].tolist() == [2, 0, 3, 1]
    assert [task.new for task in planned.tasks] == [(0, 1), (2, 3)] and [task.seen for task in planned.tasks] == [(0, 1), (0, 1, 2, 3)]
    names = {DATA.train.classes[old]: planned.data.train.classes[new] for old, new in zip(DATA.train.labels, planned.data.train.labels)}  # noqa: B905
    assert all(old == new for old, new in names.items())
    assert torch.equal(planned.data.train.pixels, DATA.train.pixels) and torch.equal(planned.data.test.pixels, DATA.test.pixels)


def test_rounds_are_of_steps_in_turn() -> None:
    planned = course()
    assert planned.total == 4 and [planned.step(round) for round in (1, 2, 3, 4)] == [0, 0, 1, 1]
    assert [planned.begins(round) for round in (1, 2, 3, 4)] == [True, False, True, False]
    assert [planned.ends(round) for round in (1, 2, 3, 4)] == [False, True, False, True]
    assert [planned.classes(step) for step in (0, 1)] == [2, 4]


def test_clients_hold_a_task_s_images_between_them_and_each_image_once() -> None:
    planned = course()
    for step in (0, 1):
        held = torch.cat([planned.images(client, step).pixels.flatten() for client in planned.members(step)])
        wanted = planned.data.train.pixels.flatten()[planned.tasks[step].train]
        assert held.sort().values.tolist() == wanted.sort().values.tolist()
        assert set(planned.images(0, step).labels.tolist()) <= set(planned.tasks[step].new)


def test_who_joins_late_has_no_work_before_and_who_is_behind_works_on_an_earlier_task() -> None:
    planned = course(joins=(0, 1, 0), behind=(0, 0, 1))
    assert [planned.members(step) for step in (0, 1)] == [[0], [0, 1, 2]]
    assert [planned.task(client, 1).number for client in (0, 1, 2)] == [1, 1, 0]
    assert set(planned.images(2, 1).labels.tolist()) <= {0, 1}


def test_earlier_images_are_those_of_earlier_tasks_and_as_many_of_each() -> None:
    scenario = DomainIncremental(order=("x", "y"))
    planned = course(scenario)
    assert len(planned.earlier(0, 0, None, seed=0)) == 0 == len(planned.earlier(0, 0, 5, seed=0))
    past, few = planned.earlier(0, 1, None, seed=0), planned.earlier(0, 1, 7, seed=0)
    assert torch.equal(past.pixels, planned.images(0, 0).pixels) and len(few) == 7
    assert set(few.pixels.flatten().tolist()) < set(past.pixels.flatten().tolist())
    assert torch.equal(few.pixels, planned.earlier(0, 1, 7, seed=0).pixels)
    four = course(ClassIncremental(tasks=(2, 1, 1), order=None))
    of_task = [int(torch.isin(four.earlier(0, 2, 9, seed=0).labels, torch.tensor(task.new)).sum()) for task in four.tasks]
    assert of_task == [4, 5, 0]  # 9 over two tasks


def test_the_manifest_counts_over_all_tasks_and_holds_each() -> None:
    manifest = course().manifest
    assert torch.tensor(manifest["counts"]).sum(0).tolist() == [40, 40, 40, 40] and sum(manifest["sizes"]) == 160
    assert len(manifest["dealt"]) == 2 and manifest["attendance"] == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rounds": 0}, "config key 'rounds' is 0"),
        ({"joins": (0, 1)}, "config key 'joins' is .*; allowed: null, or 3 whole numbers"),
        ({"behind": (0, 0, 0, 0)}, "config key 'behind' is .*; allowed: null, or 3 whole numbers"),
        ({"scenario": ClassIncremental(tasks=4, order=None)}, "a first task of two classes or more"),
        ({"clients": 200}, "in task 0"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        course(**wrong)
