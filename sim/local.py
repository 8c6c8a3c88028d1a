"""The runner of choice: both apps in this process."""

from __future__ import annotations

from flwr.app import Context, RecordDict, UserConfig

from sim import client_app, server_app
from sim.client_states import states_of
from sim.config import Settings
from sim.grid import RUN_ID, SERVER_NODE, LocalGrid


def run_local(settings: Settings) -> None:
    """Run the federation of ``settings`` with Flower's apps on a grid in this process."""
    run_config: UserConfig = {"settings": settings.to_json()}
    context = Context(run_id=RUN_ID, node_id=SERVER_NODE, node_config={}, state=RecordDict(), run_config=run_config)
    grid = LocalGrid(client_app.app, settings.nodes, run_config)
    grid.states = states_of(settings)
    server_app.app(grid, context)
