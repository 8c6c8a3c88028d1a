"""Teacher and student pairs for ``methods.py``, and every method's settings on them, at one budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from given import Given

from fedimpr.distillation import Distillation, LogitL1, LogitMSE, Mining, Objective, SoftDivergence
from fedimpr.synthesis import (
    AdversarialGenerator,
    ChannelExchange,
    ContrastiveModelInversion,
    DataImpressions,
    DeepInversion,
    FastMetaInversion,
    NoisyLayerGenerator,
    Synthesizer,
)
from fedimpr.synthesis.priors import Priors
from fedimpr.synthesis.targets import ClassSimilarity, FeatureGaussian, OneHot
from fedimpr.training import LocalTraining
from fedimpr.views import Augmentation, Dilated, Distorted, Superimposed, Views

LONG = ", long"
MUON = ", Muon"
INHERITED = ", inherited"
PLAIN = ("di", "ci", "soft_targeted")  # methods that look at the logits alone, and were published on a teacher without batch norm
STILL = Views(shift=0.0, scale=(1.0, 1.0), rotation=0.0, flip=False)


@dataclass(frozen=True)
class Learning:
    """A student's optimiser, and how many views it has the choice of for each one that it learns from."""

    optimizer: Literal["sgd", "adam", "muon"]
    lr: float
    weight_decay: float
    momentum: float = 0.9
    candidates: int = 1


ORTHOGONAL = Learning("muon", 0.005, 0.0, 0.95)


@dataclass(frozen=True)
class Budget:
    """What every method may spend, and the settings that methods share.

    Attributes:
        passes: images through the teacher for mining.
        steps: of the student.
        batch: images per step of the student.
        learning: how the student's weights move.
        playing: likewise, where it plays against a generator.
        views: of the student's images.
        local: the local views of CMI.
        heavy: augmentation of the student's images where they are mined from pixels by the logits alone, as ZSKD has it.
        jitter: views in which methods that have them look at their images while mining.
        moved: likewise, of data impressions and their kin.
        brightness: of the noise that those start from.
        objective: of the student, where the method's paper is not about another.
        mined: images per batch of mining.
        dreaming: steps per batch of data impressions and their kin.
        inversion: steps per batch of the other methods that do not say otherwise.
        pixel_lr: of methods that optimise pixels.
        generator_lr: of methods that train a generator for each batch.
        latent: size of latents.
        width: of generators.
        deviation: of soft-targeted transfer sets.
        activation: their activation weight, as published.
    """

    passes: int
    steps: int
    batch: int
    learning: Learning
    playing: Learning
    views: Augmentation
    local: Views
    heavy: Augmentation
    jitter: Views
    moved: Views
    brightness: float
    objective: Objective
    mined: int
    dreaming: int
    inversion: int
    pixel_lr: float
    generator_lr: float
    latent: int
    width: int
    deviation: float
    activation: float


@dataclass(frozen=True)
class Run:
    """A method's settings."""

    synthesizer: Synthesizer
    mining: Mining
    distillation: Distillation


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

    @property
    def runs(self) -> dict[str, Callable[..., Run]]:
        """Every method's settings by name; ``tiny=True`` shrinks the budget to a few steps."""

        def made(name: str, tiny: bool) -> Run:
            method = started(name).removesuffix(LONG).removesuffix(MUON)
            passes, steps, rate = self.long[method] if name.endswith(LONG) else (1.0, 1.0, 1.0)
            budget = replace(self.budget, learning=replace(self.budget.learning, lr=rate * self.budget.learning.lr))
            if name.endswith(MUON):
                passes, steps, candidates = self.muon[method]
                views, heavy = (Superimposed(share=0.3, views=views) for views in (budget.views, budget.heavy))
                budget = replace(
                    budget, learning=replace(ORTHOGONAL, candidates=candidates), objective=LogitMSE(), views=views, heavy=heavy
                )
            budget = replace(budget, passes=int(passes * budget.passes), steps=int(steps * budget.steps))
            small = replace(budget, passes=64, steps=4, batch=8, mined=8, dreaming=2, inversion=2, width=8)
            return RUNS[method](small if tiny else budget)

        names = [*RUNS, *(f"{name}{INHERITED}" for name in self.inherited)]
        names += [*(f"{name}{LONG}" for name in names if started(name) in self.long), *(f"{name}{MUON}" for name in self.muon)]
        return {name: lambda tiny, name=name: made(name, tiny) for name in names}  # type: ignore[misc]

    def taught(self, name: str) -> str:
        """Which teacher a method learns from: ``"plain"`` or ``"teacher"``."""
        return "plain" if self.plain is not None and name.partition(",")[0] in PLAIN else "teacher"


def started(name: str) -> str:
    """The run with the same settings whose student starts from random weights."""
    return name.replace(INHERITED, "")


def priors(**weights: Any) -> Priors:
    """The given weights; all others zero."""
    terms = ("target", "confidence", "entropy", "balance", "activation", "batch_norm", "total_variation", "norm", "adversarial")
    forms = {"batch_norm_form": "distance", "adversarial_form": "masked_kl"}
    return Priors(**{**dict.fromkeys(terms, 0.0), **forms, **weights})


def learns(b: Budget, objective: Objective | None = None, views: Augmentation | None = None) -> Distillation:
    """How every student learns."""
    how = {"objective": objective or b.objective, "views": views or b.views, **asdict(b.learning)}
    return Distillation(steps=b.steps, batch_size=b.batch, **how)


def mines(images: int, b: Budget, *, together: bool = False, before: float = 0.0) -> Mining:
    """Whole batches of images: all at once, or one batch a portion; a share of them ``before`` the student's first step."""
    batches = max(images // b.mined, 1)
    first = min(int(before * batches), batches - 1)
    return Mining(images=batches * b.mined, before=first * b.mined, portions=1 if together else batches - first, capacity=batches * b.mined)


def impressions(b: Budget, targets: Any, views: Views | None = None, **weights: float) -> Run:
    made = DataImpressions(
        targets=targets, priors=priors(target=1.0, **weights), temperature=20.0, steps=b.dreaming, lr=b.pixel_lr, batch_size=b.mined,
        variant="text",
        brightness=b.brightness if views is None else 1.0, views=views or b.moved,
    )  # fmt: skip
    return Run(made, mines(b.passes // b.dreaming, b, together=True), learns(b, views=b.heavy))


def deep_inversion(b: Budget, adversarial: float) -> Run:
    weights = priors(target=1.0, batch_norm=10.0, total_variation=1e-4, adversarial=adversarial, adversarial_form="js")
    made = DeepInversion(priors=weights, steps=b.inversion, lr=b.pixel_lr, batch_size=b.mined, noise=0.2, temperature=20.0, views=b.jitter)
    return Run(made, mines(b.passes // b.inversion, b, together=adversarial == 0), learns(b))


def contrastive(b: Budget, adversarial: float, before: float) -> Run:
    made = ContrastiveModelInversion(
        priors=priors(target=1.0, batch_norm=1.0, adversarial=adversarial), contrastive_weight=0.8, contrast_temperature=0.1,
        latent=b.latent, width=b.width, steps=b.inversion, lr=b.generator_lr, batch_size=b.mined, features="batch_norm", hidden=512,
        projection=64, memory=4000, negatives=512, temperature=20.0, global_view=b.jitter, local_view=b.local,
    )  # fmt: skip
    return Run(made, mines(b.passes // (2 * b.inversion), b, together=adversarial == 0, before=before), learns(b))


def fast(b: Budget) -> Run:
    made = FastMetaInversion(
        priors=priors(target=0.4, batch_norm=10.0, adversarial=1.1), meta="fomaml", latents="fresh", latent=b.latent, width=b.width,
        steps=10, lr=2e-3, latent_lr=0.01, momentum=0.9, batch_size=b.mined, temperature=20.0, views=b.jitter,
    )  # fmt: skip
    return Run(made, mines(b.passes // 10, b, before=0.1), learns(b))


def exchange(b: Budget) -> Run:
    made = ChannelExchange(
        priors=priors(target=0.5, batch_norm=1.0), latent=b.latent, width=b.width, steps=b.inversion, lr=b.generator_lr / 2,
        batch_size=b.mined, exchanged=0.7, temperature=20.0, views=b.jitter,
    )  # fmt: skip
    return Run(made, mines(b.passes // b.inversion, b), learns(b))


def noisy(b: Budget) -> Run:
    made = NoisyLayerGenerator(
        priors=priors(target=0.5, batch_norm=10.0, adversarial=1.33), embeddings=None, embedding=b.latent, latent=b.latent, width=b.width,
        shared=10, life=20, steps=30, lr=4e-3, momentum=0.9, batch_size=b.mined, temperature=20.0, views=b.jitter,
    )  # fmt: skip
    return Run(made, mines(b.passes // 30, b, before=0.2), learns(b))


def game(b: Budget, turns: int, objective: Objective, **weights: Any) -> Run:
    """One step of the generator, of half the width, and ``turns`` of the student, on images of their own; no views, as published."""
    rounds = max(b.steps // turns, 1)
    steps = max(b.passes // (rounds * b.batch), 1) if turns == 1 else 1
    made = AdversarialGenerator(
        priors=priors(**weights), latent=b.latent, width=b.width // 2, steps=steps, lr=1e-3, batch_size=b.batch, temperature=1.0
    )
    size = turns * b.batch
    learning = learns(replace(b, learning=b.playing), objective, STILL)
    return Run(made, Mining(images=rounds * size, before=0, portions=rounds, capacity=size), learning)


def given(b: Budget, real: bool) -> Run:
    count = 60_000 if real else 50 * b.mined
    return Run(Given(real), Mining(images=count, before=0, portions=1, capacity=count), learns(b, views=b.local if real else b.heavy))


SOFT, KL = SoftDivergence(temperature=1.0), {"adversarial": 1.0, "adversarial_form": "kl"}
RUNS: dict[str, Callable[[Budget], Run]] = {
    "real images": lambda b: given(b, real=True),
    "noise": lambda b: given(b, real=False),
    "di": lambda b: impressions(b, ClassSimilarity(betas=(0.1, 1.0), scaling="matrix")),
    "di, beta 0.1": lambda b: impressions(b, ClassSimilarity(betas=(0.1,), scaling="matrix")),
    "di, beta 1": lambda b: impressions(b, ClassSimilarity(betas=(1.0,), scaling="matrix")),
    "di, still": lambda b: impressions(b, ClassSimilarity(betas=(0.1, 1.0), scaling="matrix"), STILL),
    "ci": lambda b: impressions(b, OneHot()),
    "soft_targeted": lambda b: impressions(b, FeatureGaussian(deviation=b.deviation), activation=b.activation),
    "deep_inversion": lambda b: deep_inversion(b, 0.0),
    "adi": lambda b: deep_inversion(b, 10.0),
    "cmi_inverted": lambda b: contrastive(b, 0.0, 0.0),
    "cmi": lambda b: contrastive(b, 0.5, 0.0),
    "cmi_warm": lambda b: contrastive(b, 0.5, 0.8),
    "fast": fast,
    "spaceship": exchange,
    "nayer": noisy,
    "dafl": lambda b: game(b, 1, SOFT, confidence=1.0, balance=5.0, activation=0.1),
    "zskt": lambda b: game(b, 10, SOFT, **KL),
    "dfq": lambda b: game(b, 1, SOFT, entropy=1.0, balance=1.0, batch_norm=1.0, batch_norm_form="divergence", **KL),
    "dfad": lambda b: game(b, 5, LogitL1(), adversarial=1.0, adversarial_form="l1"),
}


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
        published={"di, long": "98.77", "soft_targeted, long": "99.08", "dafl": "98.1", "dfad": "98.3"},
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
