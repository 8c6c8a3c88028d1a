"""Distillation: a student learns from a teacher on impressions."""

from fedimpr.distillation.distil import Distillation, Mining, mine_and_distil, soft_divergence

__all__ = ["Distillation", "Mining", "mine_and_distil", "soft_divergence"]
