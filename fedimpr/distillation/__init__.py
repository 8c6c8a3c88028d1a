"""Distillation: a student learns from a teacher on impressions."""

from fedimpr.distillation.contrastive import ContrastiveRepresentation
from fedimpr.distillation.distil import Distillation, Mining, Spent, mine_and_distil
from fedimpr.distillation.mine import mine
from fedimpr.distillation.objectives import Hints, LogitL1, LogitMSE, Objective, SoftDivergence, soft_divergence
from fedimpr.distillation.reconstructing import reconstruct
from fedimpr.distillation.resuming import Saves
from fedimpr.distillation.starts import Starts

__all__ = [
    "ContrastiveRepresentation",
    "Distillation",
    "Hints",
    "LogitL1",
    "LogitMSE",
    "Mining",
    "Objective",
    "Saves",
    "SoftDivergence",
    "Spent",
    "Starts",
    "mine",
    "mine_and_distil",
    "reconstruct",
    "soft_divergence",
]
