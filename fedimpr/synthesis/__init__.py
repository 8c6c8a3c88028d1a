"""Synthesizers: methods that turn a teacher into impressions."""

from fedimpr.synthesis.base import Progress, Synthesizer, silent
from fedimpr.synthesis.contrastive import ContrastiveModelInversion
from fedimpr.synthesis.data_impressions import DataImpressions

__all__ = ["ContrastiveModelInversion", "DataImpressions", "Progress", "Synthesizer", "silent"]
