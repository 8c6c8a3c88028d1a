"""An ensemble of ten equal models: members in turn, in one batched call, or each in a stream of the device.

    python benchmarks/ensemble.py
    python benchmarks/ensemble.py --device cuda
    python benchmarks/ensemble.py --tiny

Milliseconds a call (median) that takes logits and batch statistics, forward alone and with the gradient of the images, as a step of
synthesis does. The batched call is ``torch.func.vmap``, which makes grouped convolutions of the members' own. The rule in
``fedimpr/ensemble.py`` (PIXELS_WORTH_BATCHING) is read off the CPU's table. Neither Flower nor Ray nor Hydra is needed.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import write
from torch import Tensor

from fedimpr.devices import accelerated, placed
from fedimpr.ensemble import PIXELS_WORTH_BATCHING, Ensemble
from fedimpr.models import build
from fedimpr.observation import observe

MEMBERS, REPEATS = 10, 10
CASES = [("lenet5", 8), ("lenet5", 16), ("lenet5", 28), ("wrn16_1", 32), ("cnn128", 32), ("resnet18", 32)]
OPTIONS: dict[str, dict[str, Any]] = {"lenet5": {"batch_norm": True}}
BATCHES = [4, 16, 64, 256]
MOST = {"wrn16_1": 64, "cnn128": 16, "resnet18": 4}  # the largest batches on a CPU: a call must not take many seconds
KINDS = ("forward", "gradient")

Way = Callable[[Tensor], tuple[Tensor, Tensor]]  # from images to logits and batch statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="two members and the smallest batch, written nowhere but to the screen")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(asked.device)
    members, batches, repeats = (2, BATCHES[:1], 1) if asked.tiny else (MEMBERS, BATCHES, REPEATS)
    cases = [(name, side, batch) for name, side in CASES for batch in batches if device.type != "cpu" or batch <= MOST.get(name, batch)]
    rows = [measure(name, side, batch, device, members, repeats) for name, side, batch in cases]
    if asked.tiny:
        print(table(rows, device))
        return
    name, options = ("ensemble", "") if device.type == "cpu" else ("ensemble_cuda", " --device cuda")
    facts = {"members": members, "threads": 1, "device": device.type, "rows": rows}
    write(name, f"python benchmarks/ensemble.py{options}", facts, table(rows, device))


def measure(name: str, side: int, batch: int, device: torch.device, members: int, repeats: int) -> dict:
    """Median milliseconds of each way, taken alternately."""
    channels = 1 if name == "lenet5" else 3
    about = {"shape": (channels, side, side), "classes": 10, "mean": [0.5] * channels, "std": [0.3] * channels, **OPTIONS.get(name, {})}
    ways, images = all_ways([build(name, seed=seed, **about) for seed in range(members)], device), torch.rand(batch, channels, side, side)
    times: dict[str, dict[str, list[float]]] = {kind: {way: [] for way in ways} for kind in KINDS}
    for repeat in range(repeats + 2):
        for way, call in ways.items():
            for kind in KINDS:
                start = clock(device)
                with torch.set_grad_enabled(kind == "gradient"), accelerated(device):
                    x = images.to(device, copy=True).requires_grad_(kind == "gradient")
                    logits, statistics = call(x)
                if kind == "gradient":
                    (logits.logsumexp(1).sum() + statistics.square().sum()).backward()
                if repeat > 1:
                    times[kind][way].append(1e3 * (clock(device) - start))
    return {"model": name, "side": side, "batch": batch, **{kind: {way: median(of) for way, of in times[kind].items()} for kind in KINDS}}


def all_ways(models: list, device: torch.device) -> dict[str, Way]:
    """The ways to compute an ensemble of these models on a device, by name."""

    def whole(ensemble: Ensemble, images: Tensor) -> tuple[Tensor, Tensor]:
        return observe(ensemble, images, statistics=True)[:2]

    ways: dict[str, Way] = {}
    for way, batched in (("in turn", False), ("batched", True)):
        ways[way] = functools.partial(whole, placed(Ensemble(models, batched=batched), device))
    if device.type != "cuda":
        return ways
    streams = [torch.cuda.Stream() for _ in models]

    def streamed(images: Tensor) -> tuple[Tensor, Tensor]:
        now, seen = torch.cuda.current_stream(), []
        for model, stream in zip(models, streams, strict=True):
            stream.wait_stream(now)
            with torch.cuda.stream(stream):
                seen.append(observe(model, images, statistics=True))
        for stream in streams:
            now.wait_stream(stream)
        return torch.stack([one.logits for one in seen]).mean(0), torch.cat([one.statistics for one in seen], 1)

    return {**ways, "streams": streamed}


def table(rows: list[dict], device: torch.device) -> str:
    """One line a case."""
    ways = list(rows[0]["forward"])
    said = ", ".join(ways)
    columns = ["model", "side", "batch", f"forward: {said} (ms)", f"with gradient: {said} (ms)", "batched / in turn", "rule says"]
    text = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        times = [", ".join(f"{row[kind][way]:.1f}" for way in ways) for kind in KINDS]
        ratios = ", ".join(f"{row[kind]['batched'] / row[kind]['in turn']:.2f}" for kind in KINDS)
        rule = "batched" if device.type != "cpu" or row["batch"] * row["side"] ** 2 <= PIXELS_WORTH_BATCHING else "in turn"
        text.append(f"| {row['model']} | {row['side']} | {row['batch']} | {' | '.join(times)} | {ratios} | {rule} |")
    return "\n".join(text)


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
