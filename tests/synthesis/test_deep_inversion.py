"""DeepInversion and its adaptive form."""

from __future__ import annotations

import pytest
import torch

from fedimpr.errors import ConfigError
from fedimpr.models import final_layer
from fedimpr.synthesis import DeepInversion
from fedimpr.synthesis.priors import disagreement
from fedimpr.views import Views
from tests.makers import CLASSES, SHAPE, Linear, priors, small_ensemble, small_model


def method(**changes) -> DeepInversion:
    settings = {"priors": priors(target=1.0), "steps": 40, "lr": 0.05, "batch_size": 8, "noise": 0.2, "temperature": 20.0}
    settings |= {"views": Views(shift=0.0, scale=(1.0, 1.0), rotation=0.0, flip=False)}
    return DeepInversion(**{**settings, **changes})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loud(seed: int) -> torch.nn.Module:
    """A small model, its decisions held with some force."""
    model = small_model(seed)
    for value in final_layer(model).parameters():
        value.data *= 20
    return model


def test_a_batch_starts_from_noise_around_grey() -> None:
    """With one step the best images are those that were judged in it, the start: 0.5 + noise * N(0, 1), cut to [0, 1]."""
    made = method(steps=1, noise=0.3).synthesize(small_model(), 8, generator(), shape=SHAPE)
    source = generator()
    labels = torch.randint(CLASSES, (8,), generator=source)
    expected = (0.5 + 0.3 * torch.randn(8, *SHAPE, generator=source)).clamp(0, 1)
    assert torch.equal(made.labels, labels) and torch.equal(made.images, expected)


def test_one_step_is_the_step_of_adam_on_the_cross_entropy() -> None:
    """Adam's first step moves every pixel by lr against the sign of its gradient, W^T (softmax(W x) - e) for the wanted class's unit
    vector e; then the image is projected to [0, 1]. The second of two steps judges that image, and finds it better than the start.
    """
    weight, lr = torch.tensor([[2.0, -1.0], [-3.0, 1.0]]), 0.1
    made = method(steps=2, lr=lr).synthesize(Linear(weight.tolist()), 8, generator(3), shape=(1, 1, 2))
    source = generator(3)
    wanted = torch.eye(2)[torch.randint(2, (8,), generator=source)]
    start = (0.5 + 0.2 * torch.randn(8, 1, 1, 2, generator=source)).clamp(0, 1).flatten(1)
    gradient = ((start @ weight.T).softmax(1) - wanted) @ weight
    expected = (start - lr * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(made.images.flatten(1), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(made.targets, (expected @ weight.T / 20).softmax(1))  # stored at temperature 20
    assert made.teacher_passes == 2 * 8 + 8


TERMS = ("target", "confidence", "entropy", "balance", "activation", "batch_norm", "total_variation", "norm")


@pytest.mark.parametrize("term", TERMS)
def test_each_term_brings_down_what_it_weighs(term: str) -> None:
    """The start is what one step gives. Balance and activation are negative, and balance begins near its least, -ln 4."""
    only, teacher = priors(**{term: 1.0}), loud(0)

    def value(steps: int) -> float:
        made = method(priors=only, steps=steps).synthesize(teacher, 8, generator(), shape=SHAPE)
        return only.bound(teacher, None)(made.images, made.labels)[term].item()

    start = value(1)
    assert value(40) < start - 0.05 * abs(start)


def test_the_adaptive_form_finds_where_the_student_disagrees() -> None:
    """Beside the class term the adversarial one makes the difference."""
    teacher, student = loud(0), loud(1)

    def found(weight: float) -> float:
        adaptive = method(priors=priors(target=1.0, adversarial=weight, adversarial_form="js"))
        made = adaptive.synthesize(teacher, 8, generator(), shape=SHAPE, student=student)
        with torch.no_grad():
            return disagreement(teacher(made.images), student(made.images), "js").item()

    assert found(20.0) > 1.5 * found(0.0)


def test_pixels_stay_in_range_however_wild_start_and_step() -> None:
    images = method(noise=10.0, lr=10.0, steps=5).synthesize(small_model(), 8, generator(), shape=SHAPE).images
    assert float(images.min()) == 0 and float(images.max()) == 1


def test_jitter_moves_what_the_teacher_sees_and_not_the_images() -> None:
    """A shift leaves black borders in the views; in the images, which start with no black pixel, there are none."""
    shifted = Views(shift=0.25, scale=(1.0, 1.0), rotation=0.0, flip=True)
    made = method(views=shifted, steps=2, lr=1e-3, noise=0.01).synthesize(small_model(), 8, generator(), shape=SHAPE)
    still = method(steps=2, lr=1e-3, noise=0.01).synthesize(small_model(), 8, generator(), shape=SHAPE)
    assert float(made.images.min()) > 0.4
    assert not torch.equal(made.targets, still.targets)


def test_the_last_batch_is_cut() -> None:
    made = method(steps=1).synthesize(small_ensemble(), 20, generator(), shape=SHAPE)
    assert len(made) == 20 and made.teacher_passes == 3 * 8 + 20  # three whole batches were optimised


@pytest.mark.parametrize("key", ["steps", "lr", "batch_size", "noise", "temperature"])
def test_settings_out_of_range_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        method(**{key: 0})
