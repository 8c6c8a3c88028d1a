"""How fast images are mined: steps of inversion, a plain loop beside ours, and an ensemble beside single models.

    OMP_NUM_THREADS=1 python benchmarks/synthesis_speed.py
    python benchmarks/synthesis_speed.py --device cuda --peak-float32 495 --peak-bfloat16 989
    python benchmarks/synthesis_speed.py --tiny

``throughput``: images x steps per second of one step of inversion (class and batch-norm terms) by batch, precision and layout of the
weights, and where its time goes. ``loop``: CMI by ``fedimpr`` against ``plain_cmi.py``, see ``race.py``. ``ensemble``: a step with ten
equal models as one teacher against ten steps with single ones. ``compiled``: steps through code of ``torch.compile``, and after how many of
them that has paid for itself. Networks have fresh weights: speed does not depend on them. On a CPU there
is one thread. Written to ``results/synthesis_speed``, beside a GPU to ``results/synthesis_speed_cuda``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from budgets import priors
from common import write
from ensemble import clock
from pairs import CIFAR10, MNIST
from race import loop
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedimpr.devices import placed
from fedimpr.ensemble import Ensemble
from fedimpr.errors import FedimprError
from fedimpr.models import build
from fedimpr.observation import batch_norm_layers, compiled
from fedimpr.synthesis.descent import descend

REPEATS, MEMBERS = 5, 10
SPAN = 0.2  # seconds that a timed stretch of steps takes at least
NETWORKS: dict[str, dict[str, Any]] = {
    "LeNet-5 with batch norm": {"name": "lenet5", "batch_norm": True, **MNIST},
    "ResNet-8": {"name": "resnet8", "width": 16, "stride": 1, **CIFAR10},
    "WRN-40-2": {"name": "wrn40_2", **CIFAR10},
    "ResNet-34": {"name": "resnet34", **CIFAR10},
    "CNN-128": {"name": "cnn128", **CIFAR10},
    "ResNet-18": {"name": "resnet18", **CIFAR10},
}
GPU_ONLY = ("WRN-40-2", "ResNet-34", "ResNet-18")
WAYS = [(precision, layout) for precision in ("float32", "bfloat16") for layout in ("contiguous", "channels-last")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--steps", type=int, help="of mining in a repetition of the loop (20, beside a GPU 200); twice as many distil")
    for precision in ("float32", "bfloat16"):
        parser.add_argument(f"--peak-{precision}", type=float, help=f"TFLOP/s of the device in {precision}, as its maker states them")
    parser.add_argument("--tiny", action="store_true", help="a step of everything, written nowhere but to the screen")
    asked = parser.parse_args()
    asked.device = torch.device(asked.device)
    if asked.device.type == "cpu":
        torch.set_num_threads(1)
    found, texts = {}, []
    for part, measure in PARTS.items():
        found[part], text = measure(asked) if part in asked.parts else (None, "not measured")
        texts.append(f"## {part}\n\n{text}")
    if asked.tiny:
        print("\n\n".join(texts))
        return
    peaks = {precision: getattr(asked, f"peak_{precision}") for precision in ("float32", "bfloat16")}
    options = [f"--device {asked.device}", *(f"--peak-{key} {value:g}" for key, value in peaks.items() if value)]
    options += [f"--parts {' '.join(asked.parts)}"] if len(asked.parts) < len(PARTS) else []
    options += [f"--steps {asked.steps}"] if asked.steps else []
    facts = {"device": str(asked.device), "threads": torch.get_num_threads(), "tf32 convolutions": torch.backends.cudnn.allow_tf32, **found}
    name = f"synthesis_speed{'_cuda' * (asked.device.type == 'cuda')}"
    write(name, f"python benchmarks/synthesis_speed.py {' '.join(options)}", facts, "\n\n".join(texts))


def inversion(model: nn.Module, shape: tuple[int, ...], batch: int, precision: str, device: torch.device) -> Callable[[int], None]:
    """What takes a number of steps of inversion with a batch, as the library takes them."""
    model.eval().requires_grad_(False)
    loss = priors(target=1.0, batch_norm=1.0 if batch_norm_layers(model) else 0.0).bound(model, None)
    labels = torch.arange(batch, device=device) % 10
    x = torch.rand(batch, *shape, device=device).requires_grad_()
    adam = torch.optim.Adam([x], lr=0.01)

    def steps(count: int) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False):
            descend(
                lambda: x,
                lambda images: loss(images, labels),
                [adam],
                steps=count,
                told=lambda *_: None,
                keep="last",
                project=lambda: x.clamp_(0, 1),
            )

    return steps


def timed(ways: dict[Any, Callable[[int], None]], device: torch.device, tiny: bool) -> dict[Any, float]:
    """Median seconds of a step by each way, taken alternately."""
    counts, spent = {}, {way: [] for way in ways}
    for way, steps in ways.items():
        steps(1)  # the first step also plans and allocates
        start = clock(device)
        steps(1)
        counts[way] = 1 if tiny else max(round(SPAN / (clock(device) - start)), 1)
    for _ in range(1 if tiny else REPEATS):
        for way, steps in ways.items():
            start = clock(device)
            steps(counts[way])
            spent[way].append((clock(device) - start) / counts[way])
    return {way: median(seconds) for way, seconds in spent.items()}


def throughput(asked: Any) -> tuple[list[dict], str]:
    """Rows and text of the first part."""
    device, rows, notes = asked.device, [], []
    names = ["LeNet-5 with batch norm", "ResNet-8", "WRN-40-2", "ResNet-34"]
    batches = [4] if asked.tiny else [16, 64, 256] if device.type == "cpu" else [64, 256, 1024]
    text = ["| network | batch | precision | weights | images x steps a second | ms a step | TFLOP/s | share of peak |", "|---" * 8 + "|"]
    for name in names:
        if name in GPU_ONLY and device.type == "cpu":
            text.append(f"| {name} | not measured |{' |' * 6}")
            continue
        shape = NETWORKS[name]["shape"]
        for batch in batches:
            ways = {}
            for precision, layout in WAYS:
                model = build(**NETWORKS[name], seed=0)
                model = placed(model, device) if layout == "channels-last" else model.to(device)
                ways[precision, layout] = inversion(model, shape, batch, precision, device)
            with FlopCounterMode(display=False) as counter:
                ways[WAYS[0]](1)
            seconds = timed(ways, device, asked.tiny)
            for way in WAYS:
                rate = counter.get_total_flops() / seconds[way] / 1e12
                peak = getattr(asked, f"peak_{way[0]}")
                row = {"network": name, "batch": batch, "precision": way[0], "weights": way[1], "seconds": seconds[way], "tflops": rate}
                rows.append({**row, "peak": peak})
                share = f"{100 * rate / peak:.1f} %" if peak else "no peak given"
                text.append(f"| {name} | {batch} | {' | '.join(way)} | {batch / seconds[way]:,.0f} | {1e3 * seconds[way]:.2f} "
                            f"| {rate:.3f} | {share} |")  # fmt: skip
        fastest = min(WAYS, key=lambda way: seconds[way])
        notes.append(f"{name}, batch {batches[-1]}, {', '.join(fastest)}: {profiled(ways[fastest], seconds[fastest], device)}")
        rows.append({"network": name, "profile": notes[-1]})
    said = "TFLOP/s count the multiplications and additions of convolutions and matrix products, forward and back. Where the time goes:"
    return rows, "\n".join([*text, "", said, "", *(f"- {note}" for note in notes)])


def profiled(steps: Callable[[int], None], seconds: float, device: torch.device, count: int = 5) -> str:
    """The five kernels (on a CPU, operators) that take most time, and how long the device has nothing to do in ``seconds`` a step."""
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as profile:
        steps(count)
        clock(device)
    on_device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    events = [event for event in profile.key_averages() if event.device_type == on_device and not event.is_user_annotation]
    times = {event.key: event.self_device_time_total if cuda else event.self_cpu_time_total for event in events}
    total = sum(times.values())
    first = sorted(times, key=lambda key: -times[key])[:5]
    text = ", ".join(f"{100 * times[key] / total:.0f} % `{key[:80]}`" for key in first)
    idle = f"; the device is idle for {100 * max(1 - total / 1e6 / count / seconds, 0):.0f} % of an unprofiled step" if cuda else ""
    return f"{text}{idle}."


def ensemble(asked: Any) -> tuple[list[dict], str]:
    """Rows and text of the third part."""
    device, rows = asked.device, []
    precision = "float32" if device.type == "cpu" else "bfloat16"
    batches = [2] if asked.tiny else [4, 16, 64] if device.type == "cpu" else [16, 64, 256]
    text = [
        f"| network | batch | {MEMBERS} single models, ms | in turn, ms | batched, ms | in turn / single | batched / single |",
        "|---" * 7 + "|",
    ]
    for name in ("LeNet-5 with batch norm", "CNN-128", "ResNet-18"):
        if name in GPU_ONLY and device.type == "cpu":
            text.append(f"| {name} | not measured |{' |' * 5}")
            continue
        for batch in batches:
            models = [placed(build(**NETWORKS[name], seed=seed), device) for seed in range(MEMBERS)]
            teachers = {"single": models[0]}
            for way, batched in (("in turn", False), ("batched", True)):
                teachers[way] = Ensemble([copy.deepcopy(model) for model in models], batched=batched).to(device)
            shape = NETWORKS[name]["shape"]
            ways = {way: inversion(teacher, shape, batch, precision, device) for way, teacher in teachers.items()}
            seconds = timed(ways, device, asked.tiny)
            single, in_turn, batched = MEMBERS * seconds["single"], seconds["in turn"], seconds["batched"]
            rows.append({"network": name, "batch": batch, "single": single, "in_turn": in_turn, "batched": batched})
            text.append(f"| {name} | {batch} | {1e3 * single:.1f} | {1e3 * in_turn:.1f} | {1e3 * batched:.1f} "
                        f"| {in_turn / single:.2f} | {batched / single:.2f} |")  # fmt: skip
    said = (
        f"A step with the ensemble of {MEMBERS} moves one batch, a step with each of {MEMBERS} single models moves {MEMBERS}; in "
        f"{precision}. Batched is `torch.vmap`, which turns the members' convolutions into grouped ones. A stream for each member, and "
        "grouped networks written by hand, are left out."
    )
    return rows, "\n".join([said, "", *text])


def through_a_compiler(asked: Any) -> tuple[list[dict], str]:
    """Rows and text of the fourth part."""
    device, rows = asked.device, []
    text = ["| network | batch | ms a step | compiled, ms | compiling, s | paid after steps |", "|---" * 6 + "|"]
    torch._inductor.config.force_disable_caches = True
    precision = "float32" if device.type == "cpu" else "bfloat16"
    for name in ("LeNet-5 with batch norm", "ResNet-8", "WRN-40-2", "ResNet-34"):
        if name in GPU_ONLY and device.type == "cpu":
            text.append(f"| {name} | not measured |{' |' * 4}")
            continue
        batch = 4 if asked.tiny else 200
        steps = inversion(placed(build(**NETWORKS[name], seed=0), device), NETWORKS[name]["shape"], batch, precision, device)

        def fast(count: int, steps: Callable[[int], None] = steps) -> None:
            with compiled():
                steps(count)

        start = clock(device)
        try:
            fast(1)
        except FedimprError as error:
            return [], str(error)
        first = clock(device) - start
        seconds = timed({"plain": steps, "compiled": fast}, device, asked.tiny)
        gain = seconds["plain"] - seconds["compiled"]
        paid = (first - seconds["compiled"]) / gain if gain > 0 else None
        rows.append({"network": name, "batch": batch, **seconds, "first": first, "paid": paid})
        text.append(f"| {name} | {batch} | {1e3 * seconds['plain']:.1f} | {1e3 * seconds['compiled']:.1f} | {first:.0f} "
                    f"| {'never' if paid is None else f'{paid:,.0f}'} |")  # fmt: skip
    said = f"A step of inversion as above, in {precision}, plain and inside of `fedimpr.observation.compiled`; nothing is cached on disk."
    return rows, "\n".join([said, "", *text])


PARTS: dict[str, Callable[[Any], tuple[Any, str]]] = {
    "throughput": throughput, "loop": loop, "ensemble": ensemble, "compiled": through_a_compiler,
}  # fmt: skip

if __name__ == "__main__":
    main()
