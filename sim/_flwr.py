"""The one file that touches what is private in Flower.

A grid outside Flower's own engine has to say who is sending, hand out an empty run and number messages; Flower has no public way to
do these. When a Flower release moves one of them, ``tests/sim/test_grid.py`` names it.
"""

from __future__ import annotations

from flwr.app import Message
from flwr.supercore.run import Run as Run
from flwr.supercore.task_identity import TaskIdentity

# flwr.common.constant.ErrorCode.CLIENT_APP_RAISED_EXCEPTION: the code that Flower's own engine gives to the same failure.
CLIENT_APP_RAISED = 2


def join(run_id: int, node_id: int) -> Run:
    """Let this process send messages as ``node_id`` of run ``run_id``, and return that run, empty."""
    TaskIdentity.run_id = run_id
    TaskIdentity.task_id = run_id
    TaskIdentity.node_id = node_id
    return Run.create_empty(run_id=run_id)


def number(message: Message, message_id: str) -> None:
    """Give a message the id that its reply will refer to."""
    message.metadata.__dict__["_message_id"] = message_id
    if message.metadata.message_id != message_id:
        raise RuntimeError("flwr.app.Metadata no longer keeps its id in '_message_id'; adapt sim/_flwr.py")
