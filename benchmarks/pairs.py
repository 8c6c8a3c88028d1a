"""Teacher and student pairs for ``methods.py``, each with its budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from budgets import ORTHOGONAL, RUNS, Budget, Learning, Run

from fedimpr.distillation import Hints, LogitL1, LogitMSE, SoftDivergence
from fedimpr.training import LocalTraining
from fedimpr.views import Dilated, Distorted, Superimposed, Views

LONG = ", long"
MUON = ", Muon"
CHOSEN = ", chosen"
STARTS, COMPARED = 16, 200  # students that set out, and the steps before they are compared for the first time
INHERITED = ", inherited"
PLAIN = ("di", "ci", "soft_targeted")  # methods that look at the logits alone, and were published on a teacher without batch norm


@dataclass(frozen=True)
class Pair:
    """A teacher and a student on a data set.

    Attributes:
        said: what the result file says of it.
        shape: (C, H, W).
        data: the arguments of the loader that name the data set.
        teacher: the arguments of ``models.build`` but the seed.
        plain: likewise of the teacher of methods that do not look at batch norm; ``None`` where it is the same.
        student: likewise.
        training: the teacher's stages of training, one after another; each is called with model, images and generator.
        budget: of every method.
        inherited: methods that run, too, with a student that starts from the first units of every layer of its teacher, under the name
            ``"<method>, inherited"``; all else is the same, and so are images that are mined without a look at it.
        long: methods that run, however they start, at a larger budget, too, under the name ``"<method>, long"``: passes, steps and learning
            rate times these factors.
        published: by method, the published accuracy.
        bfloat16: whether a CPU computes in bfloat16, too.
        muon: methods whose student also takes Muon's steps towards the teacher's logits, by their squared difference, from impressions that
            lie over one another at times, under the name ``"<method>, Muon"``: passes and steps times these factors, and so many views to
            choose each one from.
        chosen: likewise, where the student is the best of ``STARTS`` that begin with random units of every layer of their teacher, under
            the name ``"<method>, Muon, chosen"``.
        other: by method, what of the budget is another where the student is chosen.
    """

    said: str
    shape: tuple[int, int, int]
    data: Mapping[str, Any]
    teacher: Mapping[str, Any]
    plain: Mapping[str, Any] | None
    student: Mapping[str, Any]
    training: Callable[..., list[LocalTraining]]
    budget: Budget
    inherited: tuple[str, ...]
    long: Mapping[str, tuple[float, float, float]]
    published: Mapping[str, str]
    bfloat16: bool
    muon: Mapping[str, tuple[float, float, int]] = field(default_factory=dict)
    chosen: Mapping[str, tuple[float, float, int]] = field(default_factory=dict)
    other: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def runs(self) -> dict[str, Callable[..., Run]]:
        """Every method's settings by name; ``tiny=True`` shrinks the budget to a few steps."""

        def made(name: str, tiny: bool) -> Run:
            method = started(name).removesuffix(LONG).removesuffix(MUON)
            passes, steps, rate = self.long[method] if name.endswith(LONG) else (1.0, 1.0, 1.0)
            budget = replace(self.budget, learning=replace(self.budget.learning, lr=rate * self.budget.learning.lr))
            if MUON in name:
                passes, steps, candidates = (self.chosen if name.endswith(CHOSEN) else self.muon)[method]
                views, heavy = (Superimposed(share=0.3, views=views) for views in (budget.views, budget.heavy))
                budget = replace(
                    budget, learning=replace(ORTHOGONAL, candidates=candidates), objective=LogitMSE(), views=views, heavy=heavy
                )
            budget = replace(budget, passes=int(passes * budget.passes), steps=int(steps * budget.steps))
            budget = replace(budget, **(self.other.get(method, {}) if name.endswith(CHOSEN) else {}))
            small = replace(budget, passes=64, steps=4, batch=8, mined=8, dreaming=2, inversion=2, width=8)
            return replace(RUNS[method](small if tiny else budget), starts=STARTS if name.endswith(CHOSEN) else 1)

        names = [*RUNS, *(f"{name}{INHERITED}" for name in self.inherited)]
        names += [*(f"{name}{LONG}" for name in names if started(name) in self.long), *(f"{name}{MUON}" for name in self.muon)]
        names += [f"{name}{MUON}{CHOSEN}" for name in self.chosen]
        return {name: lambda tiny, name=name: made(name, tiny) for name in names}  # type: ignore[misc]

    def taught(self, name: str) -> str:
        """Which teacher a method learns from: ``"plain"`` or ``"teacher"``."""
        return "plain" if self.plain is not None and name.partition(",")[0] in PLAIN else "teacher"


def started(name: str) -> str:
    """The run with the same settings whose student starts from random weights."""
    return name.replace(INHERITED, "").replace(CHOSEN, "")


def trained(*stages: tuple[int, float], batch: int, views: Views) -> Callable[..., list[LocalTraining]]:
    """Stages of (epochs, learning rate); ``tiny=True`` leaves one epoch of one stage."""

    def made(tiny: bool) -> list[LocalTraining]:
        chosen = ((1, stages[0][1]),) if tiny else stages
        same = {"batch_size": batch, "momentum": 0.9, "momentum_kept": False, "weight_decay": 5e-4, "clip": 5.0, "views": views}
        return [LocalTraining(epochs=epochs, lr=lr, **same) for epochs, lr in chosen]

    return made


def parquet(name: str) -> dict[str, Any]:
    return {
        "name": name, "source": "parquet", "classes": 10,
        "sources": {"parquet": {"train": f"{name}-train.parquet", "test": f"{name}-test.parquet"}},
    }  # fmt: skip


MNIST: dict[str, Any] = {"shape": (1, 28, 28), "classes": 10, "mean": [0.1307], "std": [0.3081]}
CIFAR10: dict[str, Any] = {"shape": (3, 32, 32), "classes": 10, "mean": [0.4914, 0.4822, 0.4465], "std": [0.2470, 0.2435, 0.2616]}
DIGITS = Views(shift=0.1, scale=(0.8, 1.0), rotation=10.0, flip=False)
SHRUNK = Views(shift=0.0, scale=(1.0, 6.0), rotation=45.0, flip=False)
CROPS = Views(shift=0.125, scale=(1.0, 1.0), rotation=0.0, flip=True)
PARTS = Views(shift=0.125, scale=(0.5, 2.0), rotation=0.0, flip=True)


def published_pair(said: str, teacher: str, student: str, published: Mapping[str, str]) -> Pair:
    """A pair of the field's tables, at one budget for an accelerator."""
    return Pair(
        said=f"CIFAR-10, {said}.",
        shape=CIFAR10["shape"],
        data=parquet("cifar10"),
        teacher={"name": teacher, **CIFAR10},
        plain=None,
        student={"name": student, **CIFAR10},
        training=trained((60, 0.1), (30, 0.02), (20, 0.004), batch=128, views=CROPS),
        budget=Budget(
            passes=2_000_000, steps=20_000, batch=256, learning=Learning("sgd", 0.2, 1e-4), playing=Learning("sgd", 0.2, 1e-4),
            views=CROPS, local=CROPS,
            heavy=Distorted(blur=0.5, contrast=3.0, views=CROPS), jitter=CROPS, moved=PARTS, brightness=1.0,
            objective=SoftDivergence(temperature=20.0), mined=256, dreaming=200, inversion=200, pixel_lr=0.02,
            generator_lr=0.001, latent=256, width=128, deviation=2.0, activation=0.1,
        ),
        inherited=(),  # blocks are counted through, so a network of fewer has others at the same places
        long={},
        published=published,
        bfloat16=False,
    )  # fmt: skip


PAIRS = {
    "mnist": Pair(
        said="MNIST, LeNet-5 with batch norm (61,750 parameters) to LeNet-5-half without (35,820).",
        shape=MNIST["shape"],
        data=parquet("mnist"),
        teacher={"name": "lenet5", "batch_norm": True, **MNIST},
        plain={"name": "lenet5", "batch_norm": False, **MNIST},
        student={"name": "lenet5_half", "batch_norm": False, **MNIST},
        training=trained((6, 0.05), (4, 0.01), (2, 0.002), batch=128, views=DIGITS),
        budget=Budget(
            passes=240_000, steps=5000, batch=64, learning=Learning("sgd", 0.1, 5e-4), playing=Learning("adam", 0.004, 0.0),
            views=Distorted(blur=0.3, contrast=3.0, views=Views(shift=0.05, scale=(0.7, 4.0), rotation=25.0, flip=False)),
            local=DIGITS, heavy=Dilated(share=0.4, views=Distorted(blur=0.5, contrast=3.0, views=SHRUNK)),
            jitter=Views(shift=0.1, scale=(0.8, 2.0), rotation=15.0, flip=False),
            moved=Views(shift=0.1, scale=(0.5, 8.0), rotation=30.0, flip=False), brightness=0.1, objective=LogitL1(),
            mined=200, dreaming=60, inversion=100, pixel_lr=0.05, generator_lr=0.01, latent=64, width=32, deviation=5.0, activation=0.05,
        ),
        inherited=("di", "soft_targeted"),
        long={"real images": (1, 10, 1), "di": (6, 10, 1), "soft_targeted": (6, 10, 1), "cmi_warm": (4, 10, 1), "nayer": (2.5, 10, 0.5)},
        muon={"real images": (1, 16, 1), "di": (6, 16, 1), "soft_targeted": (6, 16, 1), "nayer": (2.5, 7, 4)},
        chosen={"soft_targeted": (12, 15, 4), "nayer": (2.5, 8, 4)},
        other={
            "soft_targeted": {
                "dreaming": 120, "brightness": 0.03, "moved": Views(shift=0.1, scale=(0.7, 5.0), rotation=25.0, flip=False),
                "objective": Hints(objective=LogitMSE(), weight=2.0),
            },
        },
        published={
            "di, long": "98.77", "soft_targeted, long": "99.08", "soft_targeted, Muon, chosen": "99.08", "dafl": "98.1", "dfad": "98.3",
        },
        bfloat16=False,
    ),
    "cifar10": Pair(
        said="CIFAR-10, ResNet-8 of 16 kernels in its first stage (78,042 parameters) to one of 8, the first convolution of stride 2.",
        shape=CIFAR10["shape"],
        data=parquet("cifar10"),
        teacher={"name": "resnet8", "width": 16, "stride": 2, **CIFAR10},
        plain=None,
        student={"name": "resnet8", "width": 8, "stride": 2, **CIFAR10},
        training=trained((8, 0.1), (4, 0.02), (2, 0.004), batch=128, views=CROPS),
        budget=Budget(
            passes=100_000, steps=1500, batch=128, learning=Learning("adam", 0.01, 0.0), playing=Learning("adam", 0.01, 0.0),
            views=CROPS, local=CROPS,
            heavy=Distorted(blur=0.5, contrast=3.0, views=CROPS), jitter=CROPS, moved=PARTS, brightness=1.0,
            objective=SoftDivergence(temperature=4.0), mined=200, dreaming=60, inversion=100, pixel_lr=0.05,
            generator_lr=0.01, latent=64, width=32, deviation=2.0, activation=0.1,
        ),
        inherited=("di", "cmi_warm", "fast", "nayer"),
        long={},
        published={},
        bfloat16=True,
    ),
    "cifar10_wrn": published_pair(
        "WRN-40-2 to WRN-16-1, the pair that CMI released settings for", "wrn40_2", "wrn16_1",
        {
            "deep_inversion": "83.04", "cmi_inverted": "87.38", "cmi": "88.82", "cmi_warm": "90.01", "fast": "89.29", "dafl": "65.71",
            "zskt": "83.74", "dfq": "86.14", "nayer": "91.94", "spaceship": "90.38",
        },
    ),
    "cifar10_wrn16_2": published_pair(
        "WRN-40-2 to WRN-16-2", "wrn40_2", "wrn16_2",
        {"deep_inversion": "89.72", "cmi_warm": "92.52", "fast": "92.45", "dafl": "81.55", "zskt": "89.66", "dfq": "92.01"},
    ),
    "cifar10_resnet": published_pair(
        "ResNet-34 to ResNet-18", "resnet34", "resnet18",
        {
            "deep_inversion": "93.26", "cmi_warm": "94.84", "fast": "94.05", "dafl": "92.22", "zskt": "93.32", "dfq": "94.61",
            "spaceship": "95.39",
        },
    ),
}  # fmt: skip
