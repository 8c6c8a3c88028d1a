"""An ensemble of equal models: members in turn against one batched call.

    python benchmarks/ensemble.py

Milliseconds a call (median), forward alone and forward with the gradient of the images, by image side and batch. The rule in
``fedimpr/ensemble.py`` (PIXELS_WORTH_BATCHING) is read off this table.
"""

from __future__ import annotations

import time
from statistics import median

import torch
from common import write

from fedimpr.ensemble import PIXELS_WORTH_BATCHING, Ensemble
from fedimpr.models import build
from fedimpr.observation import observe

MEMBERS = 10
CASES = [("lenet5", 8), ("lenet5", 16), ("lenet5", 28), ("wrn16_1", 32)]
BATCHES = [4, 16, 64, 256]


def main() -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [measure(name, side, batch, device) for name, side in CASES for batch in BATCHES if (name, batch) != ("wrn16_1", 256)]
    columns = [
        "model",
        "side",
        "batch",
        "forward: in turn, batched (ms)",
        "with gradient: in turn, batched (ms)",
        "batched / in turn",
        "rule says",
    ]
    head = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"
    lines = [
        f"| {r['model']} | {r['side']} | {r['batch']} "
        f"| {r['forward'][0]:.1f}, {r['forward'][1]:.1f} | {r['gradient'][0]:.1f}, {r['gradient'][1]:.1f} "
        f"| {r['forward'][1] / r['forward'][0]:.2f}, {r['gradient'][1] / r['gradient'][0]:.2f} "
        f"| {'batched' if device.type != 'cpu' or r['batch'] * r['side'] ** 2 <= PIXELS_WORTH_BATCHING else 'in turn'} |"
        for r in rows
    ]
    facts = {"members": MEMBERS, "threads": 1, "device": device.type, "rows": rows}
    write("ensemble", "python benchmarks/ensemble.py", facts, head + "\n".join(lines))


def measure(name: str, side: int, batch: int, device: torch.device) -> dict:
    """Median milliseconds of both ways, taken alternately."""
    channels, options = (1, {"batch_norm": True}) if name == "lenet5" else (3, {})
    ways = []
    about = {"shape": (channels, side, side), "classes": 10, "mean": [0.5] * channels, "std": [0.3] * channels}
    for batched in (False, True):
        models = [build(name, seed=seed, **about, **options) for seed in range(MEMBERS)]
        ways.append(Ensemble(models, batched=batched).to(device))
    images = torch.rand(batch, channels, side, side, device=device)
    times: dict[str, tuple[list[float], list[float]]] = {"forward": ([], []), "gradient": ([], [])}
    for repeat in range(12):
        for way, ensemble in enumerate(ways):
            for kind, spent in times.items():
                start = clock(device)
                with torch.set_grad_enabled(kind == "gradient"):
                    x = images.clone().requires_grad_(kind == "gradient")
                    seen = observe(ensemble, x, batch_norm=True)
                    if kind == "gradient":
                        (seen.logits.logsumexp(1).sum() + seen.batch_norm).backward()
                if repeat > 1:
                    spent[way].append(1e3 * (clock(device) - start))
    return {"model": name, "side": side, "batch": batch, **{kind: [median(way) for way in spent] for kind, spent in times.items()}}


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
