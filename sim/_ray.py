"""The one file that touches what is private in Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray._private.node import Node

# The methods of Ray's node that start what scales a cluster, what prints the workers' logs at the driver, and what serves the dashboard.
SUPERFLUOUS = ("start_monitor", "start_log_monitor", "start_api_server")


@contextmanager
def without_spare_processes() -> Iterator[None]:
    """A Ray that starts in the block starts no process that a run on this machine has no use for.

    Each of the three is a Python that imports Ray while workers and server import PyTorch, and Ray waits for the last one to come up, and
    for all of them when it ends: a second or two each. A release of Ray without such methods starts whole.
    """
    before = {name: method for name in SUPERFLUOUS if (method := vars(Node).get(name)) is not None}
    for name in before:
        setattr(Node, name, _nothing)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)


def _nothing(node: Node, **settings: object) -> None:
    """In place of a start."""
