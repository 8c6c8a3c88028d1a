"""The server's app: one federation from its settings to its result folder. The same in process, in simulation and in a deployment."""

from __future__ import annotations

import json

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedimpr.errors import ConfigError
from fedimpr.states import under
from sim.checkpoint import opened
from sim.config import Settings, composed, from_json, placed
from sim.errands import Workers
from sim.federation import check, initial_weights, rounds_of, strategy_of, threads
from sim.grid import OwnGrid
from sim.recorder import Recorder
from strategies.rounds import run_rounds

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what ``run_config`` asks for: ``settings`` (composed, as JSON) or else ``overrides`` (a JSON list of Hydra overrides)."""
    text = str(context.run_config.get("settings", ""))
    run(from_json(text) if text else placed(composed(json.loads(str(context.run_config.get("overrides", "[]"))))), grid)


def run(settings: Settings, grid: Grid) -> None:
    """Run a federation on a grid. Whatever ends it, the result folder says so and holds all that was finished."""
    check(settings)
    if settings.resume is not None and settings.training.get("momentum_kept") and getattr(grid, "states", None) is None:
        allowed = "null with training.momentum_kept=true on this runner: Flower's own engine forgets what clients kept when a run ends"
        raise ConfigError("resume", settings.resume, allowed)
    # Before the recorder touches the folder: what cannot be resumed stays as it is.
    with opened(settings) as (states, done, state), Recorder(settings, done) as recorder, threads(int(settings.runtime["threads"])):
        errands = grid.errands if isinstance(grid, OwnGrid) else None
        crew = None if errands is None else Workers(errands, settings, recorder.progress)
        strategy = strategy_of(settings, recorder, states, crew)
        weights = under(state, "global/") or initial_weights(settings)
        if done:
            strategy.load_state_dict(under(state, "strategy/"))
        run_rounds(
            strategy,
            grid,
            weights,
            first=done + 1,
            last=rounds_of(settings),
            after_round=lambda round, weights: states.after_round(round, weights, strategy),
        )
