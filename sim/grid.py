"""Flower's ``Grid``: what every grid of ours shares, and the one in this process, where clients run one at a time."""

from __future__ import annotations

import copy
import itertools
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Error, Message, RecordDict, UserConfigValue
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedimpr.errors import FedimprError
from sim import _flwr

if TYPE_CHECKING:  # it imports PyTorch, which workers do while the server does
    from sim.client_states import ClientStates
    from sim.errands import Errands

RUN_ID = 1
SERVER_NODE = 1
FIRST_NODE = 1000  # node FIRST_NODE + i has place i

OUT_OF_MEMORY = "out of memory"  # how the reason of such an error begins

logger = logging.getLogger(__name__)


class OwnGrid(Grid):
    """What every grid outside Flower's own engine has: the nodes with their contexts, and numbers for messages.

    Args:
        nodes: how many; place i has ``node_config`` ``{"partition-id": i, "num-partitions": nodes}``, as in Flower's simulation.
        run_config: what every client sees as ``context.run_config``.

    Attributes:
        errands: the workers that do pieces of the server's own work, see :mod:`sim.errands`; ``None``: the server does them.
        states: where clients keep what outlives their turns; ``None``: in ``context.state``, which ends with the run.
    """

    states: ClientStates | None = None
    errands: Errands | None = None

    def __init__(self, nodes: int, run_config: Mapping[str, UserConfigValue]) -> None:
        self._run = _flwr.join(RUN_ID, SERVER_NODE)
        self._contexts = make_contexts(nodes, run_config)
        self._ids = itertools.count(1)

    def set_run(self, run: _flwr.Run) -> None:
        """Replace the run that this grid reports."""
        self._run = run

    @property
    def run(self) -> _flwr.Run:
        """The run that this grid reports; empty at first."""
        return self._run

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        """Superseded in Flower by ``Message(...)``, which this calls; Flower's base class still asks for it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """All nodes, in the order of their places."""
        return list(self._contexts)

    def _bring(self, message: Message, state: RecordDict) -> None:
        """Put what the clients have kept that a message asks into the state that they see."""
        if self.states is not None:
            self.states.bring(message, self._place(message), state)

    def _take(self, message: Message, state: RecordDict) -> None:
        """Take what they keep from now on out of it."""
        if self.states is not None:
            self.states.take(message, self._place(message), state)

    def _place(self, message: Message) -> int:
        return int(self._contexts[message.metadata.dst_node_id].node_config["partition-id"])

    def _numbered(self, messages: Iterable[Message]) -> dict[str, Message]:
        """Messages by the ids that they get here, in their order.

        Raises:
            FedimprError: a message goes to a node that is not there; none is numbered.
        """
        messages = list(messages)
        for message in messages:
            if message.metadata.dst_node_id not in self._contexts:
                raise FedimprError("no such node", stage="sending a message", value=message.metadata.dst_node_id)
        numbered = {f"message-{next(self._ids)}": message for message in messages}
        for message_id, message in numbered.items():
            _flwr.number(message, message_id)
        return numbered


class LocalGrid(OwnGrid):
    """The clients of a federation, in this process.

    A client runs when its reply is pulled. So a server that pulls replies one by one holds one reply at a time, however many clients
    there are; ``send_and_receive`` pulls them all.

    Args:
        client_app: the app that every client runs.
        nodes: see :class:`OwnGrid`.
        run_config: see :class:`OwnGrid`.
        on_reply: called as ``on_reply(done, total)`` after each reply of ``send_and_receive``.
    """

    def __init__(
        self,
        client_app: ClientApp,
        nodes: int,
        run_config: Mapping[str, UserConfigValue],
        *,
        on_reply: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__(nodes, run_config)
        self._client_app, self._on_reply = client_app, on_reply
        self._waiting: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Accept messages and return their ids; nothing runs yet.

        Raises:
            FedimprError: a message goes to a node that is not there.
        """
        numbered = self._numbered(messages)
        self._waiting |= numbered
        return list(numbered)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Let the clients answer the messages with these ids, in this order; an id that is unknown or was pulled before is passed over."""
        waiting = [self._waiting.pop(i) for i in message_ids if i in self._waiting]
        return [self._answer(message) for message in waiting]

    def _answer(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        self._bring(message, context.state)
        reply = answer(self._client_app, message, context)
        self._take(message, context.state)
        return reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and return the replies in the same order.

        Args:
            messages: at most one turn of work each.
            timeout: seconds; no further client starts once they have passed, and the replies so far are returned.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        ids, replies = self.push_messages(messages), list[Message]()
        for i in ids:
            if deadline is not None and time.monotonic() >= deadline:
                self._waiting.pop(i)
                continue
            replies += self.pull_messages([i])
            if self._on_reply is not None:
                self._on_reply(len(replies), len(ids))
        return replies


def make_contexts(nodes: int, run_config: Mapping[str, UserConfigValue]) -> dict[int, Context]:
    """A fresh context for every node, by its id, in the order of places."""
    return {
        FIRST_NODE + i: Context(
            run_id=RUN_ID,
            node_id=FIRST_NODE + i,
            node_config={"partition-id": i, "num-partitions": nodes},
            state=RecordDict(),
            run_config=dict(run_config),
        )
        for i in range(nodes)
    }


def answer(client_app: ClientApp, message: Message, context: Context) -> Message:
    """One client's turn.

    The client gets records of its own, as it would from a wire: what it does to them reaches neither the server nor the next client. An
    exception becomes an error reply whose reason is the exception's text in one line; its traceback is logged at level DEBUG. Where the
    run config says ``debug``, it passes through. ``KeyboardInterrupt`` and ``SystemExit`` always do.
    """
    content = message.content
    try:
        message.content = RecordDict({key: _own(record) for key, record in content.items()})
        reply = client_app(message, context)
        if not isinstance(reply, Message):
            raise TypeError(f"the client app returned {type(reply).__name__}, not a Message")
        return reply
    except Exception as error:
        if context.run_config.get("debug"):
            raise
        logger.debug("the node at place %s failed", context.node_config["partition-id"], exc_info=True)
        return Message(Error(_flwr.CLIENT_APP_RAISED, reason(error)), reply_to=message)
    finally:
        message.content = content


def _own(record: Any) -> Any:
    """A copy of a record; what it holds is either copied or cannot change."""
    own = record.copy()
    for key, value in record.items():
        if (copied := copy.copy(value)) is not value:
            own[key] = copied
    return own


def reason(error: BaseException) -> str:
    """An exception in one line: its text, led by its type unless the text was written for people.

    Of memory that was not to be had, Python, NumPy and PyTorch speak in three ways; here all are :data:`OUT_OF_MEMORY`, with the amount.
    """
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        asked = re.search(r"allocate ([\d.]+ \w+)", text)
        return f"{OUT_OF_MEMORY}: {asked[1]} more were not to be had" if asked else OUT_OF_MEMORY
    return text if isinstance(error, FedimprError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
