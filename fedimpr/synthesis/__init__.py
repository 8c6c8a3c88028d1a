"""Synthesizers: methods that turn a teacher into impressions."""

from fedimpr.synthesis.adversarial_generator import AdversarialGenerator
from fedimpr.synthesis.base import Progress, Synthesizer, silent
from fedimpr.synthesis.contrastive import ContrastiveModelInversion
from fedimpr.synthesis.data_impressions import DataImpressions
from fedimpr.synthesis.deep_inversion import DeepInversion
from fedimpr.synthesis.fast import FastMetaInversion
from fedimpr.synthesis.nayer import NoisyLayerGenerator
from fedimpr.synthesis.spaceship import ChannelExchange

__all__ = [
    "AdversarialGenerator",
    "ChannelExchange",
    "ContrastiveModelInversion",
    "DataImpressions",
    "DeepInversion",
    "FastMetaInversion",
    "NoisyLayerGenerator",
    "Progress",
    "Synthesizer",
    "silent",
]
