"""How long a run will take, from a few seconds of each of its parts."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedimpr.errors import FedimprError

PART_SECONDS = 4.0  # of each part that is tried
IMAGES = 500  # of a client that are trained on, and of the test set that are looked at, at most


class Enough(Exception):
    """A part has been watched for long enough."""


class Pace:
    """Progress that ends what it watches after :data:`PART_SECONDS`, and knows how long all of it would take."""

    def __init__(self) -> None:
        self.first: tuple[float, int] | None = None
        self.seconds = 0.0

    def __call__(self, stage: str, done: int, total: int, **info: object) -> None:
        """Called after every step; the first one, which sets things up, does not count."""
        now = time.perf_counter()
        if self.first is None:
            self.first = now, done
        began, at = self.first
        if done > at:
            self.seconds = (now - began) / (done - at) * total
        if now - began > PART_SECONDS and done > at:
            raise Enough


def estimate(overrides: Sequence[str]) -> dict[str, float]:
    """Seconds of a run by its parts; ``overrides`` say which run. Measured in a process of its own.

    Raises:
        FedimprError: the run could not even begin.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sim.study.warm"])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "probe.json"
        process = context.Process(target=_measure, args=(list(overrides), file))
        process.start()
        process.join()
        if not file.exists():
            raise FedimprError(f"the probe ended with status {process.exitcode}", stage="probing a run")
        found: dict[str, Any] = json.loads(file.read_text())
    if "error" in found:
        raise FedimprError(found["error"], stage="probing a run")
    return found


def _measure(overrides: Sequence[str], file: Path) -> None:
    from sim.config import composed

    try:
        found: dict[str, Any] = parts(composed(overrides))
    except FedimprError as error:
        found = {"error": str(error)}
    file.write_text(json.dumps(found))


def parts(settings: Any) -> dict[str, float]:
    """Seconds by part, tried in this process. Ensembles are of untrained models: what a step costs does not depend on their weights."""
    import torch

    from fedimpr import seeds
    from fedimpr.devices import placed
    from fedimpr.ensemble import Ensemble
    from fedimpr.evaluation import evaluate
    from sim.config import construct
    from sim.federation import build_model, check, course_of, dataset_of, device_of, partition_of, rounds_of, strategy_of, threads
    from strategies import Continual, DataFree, Nobody

    begun = time.perf_counter()
    check(settings)
    data, dealt = dataset_of(settings), partition_of(settings)
    device, generator = device_of(settings), seeds.generator(settings.seed, "probe")
    found = {"start": time.perf_counter() - begun}
    cohort = settings.cohort or settings.clients

    model = placed(build_model(settings, 0), device)
    training = construct(settings.training, "training")
    images = data.train.subset(dealt.indices[0][:IMAGES])
    epoch = replace(training, epochs=1)
    with threads(settings.client_threads):
        epoch(model, images, generator)  # the first one sets things up
        begun, epochs = time.perf_counter(), 0
        while epochs == 0 or time.perf_counter() - begun < PART_SECONDS / 4:
            epoch(model, images, generator)
            epochs += 1
        image = (time.perf_counter() - begun) / epochs / len(images)
    mean = sum(map(len, dealt.indices)) / len(dealt.indices)
    course = course_of(settings)
    passes = settings.rounds if course is None else course.rounds  # over a client's images, which are those of all its tasks
    found["clients"] = image * mean * training.epochs * cohort * passes

    strategy = strategy_of(settings, Nobody())
    methods = strategy.methods if isinstance(strategy, DataFree) else {}
    rounds = rounds_of(settings)
    with threads(int(settings.runtime["threads"])):
        few = data.test.subset(slice(0, IMAGES))
        begun = time.perf_counter()
        evaluate(model.eval(), few)
        looked = (time.perf_counter() - begun) / len(few) * len(data.test)
        models = (cohort if settings.evaluate_clients else 0) + 1 + (cohort + len(methods) if methods else 0)
        found["evaluation"] = looked * models * rounds

        if methods:
            teacher = Ensemble([placed(build_model(settings, place).eval(), device) for place in range(cohort)]).to(device)
            student = placed(build_model(settings, None), device)
            for name, method in methods.items():
                pace = Pace()
                with suppress(Enough):
                    method.synthesizer.synthesize(
                        teacher, method.mining.images, generator, shape=strategy.federation.shape, student=student.eval(), progress=pace
                    )
                found[f"mining {name}"] = pace.seconds * rounds
            learning = _distilling(strategy, teacher, student, generator) * rounds
            found |= {f"distilling {name}": learning for name in methods}
        if isinstance(strategy, Continual) and strategy.method is not None:
            pace = Pace()
            with suppress(Enough):
                strategy.method.synthesizer.synthesize(
                    model, strategy.method.mining.images, generator, shape=strategy.federation.shape, student=model, progress=pace
                )
            found[f"mining {strategy.name}"] = pace.seconds * len(strategy.course.tasks)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return found


def _distilling(strategy: Any, teacher: Any, student: Any, generator: Any) -> float:
    """Seconds of all of a student's steps, on images of noise."""
    import torch

    from fedimpr.distillation import Mining, mine_and_distil
    from fedimpr.impressions import Bank, Impressions, Source

    count, shape, device = strategy.distillation.batch_size, strategy.federation.shape, next(student.parameters()).device

    class Noise:
        def synthesize(self, teacher: Any, count: int, generator: Any, **_: Any) -> Any:
            images = torch.rand(count, *shape, device=device)
            with torch.no_grad():
                return Impressions(images, teacher(images).softmax(1), torch.zeros(count, dtype=torch.long, device=device), 0)

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None:
            pass

    pace = Pace()
    with suppress(Enough):
        mine_and_distil(
            teacher, student, Noise(), mining=Mining(images=count, before=0, portions=1, capacity=count),
            distillation=strategy.distillation, bank=Bank(count), source=Source("noise", "probe", 0, 0), shape=shape, generator=generator,
            progress=pace,
        )  # fmt: skip
    return pace.seconds
