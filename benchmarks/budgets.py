"""What a method of ``methods.py`` may spend, and every method's settings at a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from given import Given

from fedimpr.distillation import Distillation, LogitL1, Mining, Objective, SoftDivergence
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
from fedimpr.views import Augmentation, Views

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
    """A method's settings, and how many students set out."""

    synthesizer: Synthesizer
    mining: Mining
    distillation: Distillation
    starts: int = field(default=1, repr=False)


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
