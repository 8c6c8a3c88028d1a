"""Terms of inversion losses: pure functions of what teacher and student answered."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def decision_adversarial(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Minus the mean over the batch of ``[same decision] * KL(teacher || student)`` at temperature 1; a scalar <= 0 (CMI).

    Minimising it pushes the student away from the teacher, but only where both still decide for the same class.

    Args:
        teacher_logits: (N, K).
        student_logits: (N, K).
    """
    agree = (teacher_logits.argmax(1) == student_logits.argmax(1)).float()
    divergence = F.kl_div(student_logits.log_softmax(1), teacher_logits.softmax(1), reduction="none").sum(1)
    return -(agree * divergence).mean()


def instance_contrast(local: Tensor, global_: Tensor, current: int, temperature: float) -> Tensor:
    """Contrastive loss over current and banked instances; a scalar (CMI).

    Each instance's local view must find its own global view among those of all instances. The mean over the current instances and the
    mean over the banked ones are added, so that a large bank does not thin the gradient of the current batch. No gradient flows through
    the keys.

    Args:
        local: unit vectors (N + B, D) of the local views, the current N first.
        global_: unit vectors (N + B, D) of the global views in the same order.
        current: N.
        temperature: tau > 0 that divides the cosines.
    """
    cosines = local @ global_.detach().T
    losses = F.cross_entropy(cosines / temperature, torch.arange(len(local), device=local.device), reduction="none")
    loss = losses[:current].mean()
    return loss + losses[current:].mean() if len(local) > current else loss
