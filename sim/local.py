"""The runner of choice: both apps in this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flwr.app import Context, RecordDict, UserConfig

from fedimpr.errors import ConfigError
from sim import client_app, server_app
from sim.client_states import states_of
from sim.config import Settings, call
from sim.grid import RUN_ID, SERVER_NODE, LocalGrid


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The settings of ``runtime=local``.

    Attributes:
        name: ``"local"``.
        threads: of the server, >= 1.
        debug: whether the first thing that a client raises ends the run, see :func:`sim.grid.answer`; otherwise the client is left out.
    """

    name: Literal["local"]
    threads: int
    debug: bool

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ConfigError("threads", self.threads, "an integer >= 1")


def run_local(settings: Settings) -> None:
    """Run the federation of ``settings`` with Flower's apps on a grid in this process.

    Raises:
        ConfigError: a setting of the runtime is out of range.
        Exception: what ends a run; with ``runtime.debug`` also what a client raises, with a note on client, round and stage.
    """
    runtime: Runtime = call(Runtime, settings.runtime, "runtime")
    run_config: UserConfig = {"settings": settings.to_json(), "debug": runtime.debug}
    context = Context(run_id=RUN_ID, node_id=SERVER_NODE, node_config={}, state=RecordDict(), run_config=run_config)
    grid = LocalGrid(client_app.app, settings.nodes, run_config)
    grid.states = states_of(settings)
    server_app.app(grid, context)
