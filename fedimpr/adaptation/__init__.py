"""Domain adaptation: a model learns from images of a domain without labels, and from what source models know."""

from fedimpr.adaptation.adversarial import Discriminator, cdan, certainty, dann, multilinear, reversal_strength, reverse
from fedimpr.adaptation.aligned import Aligned
from fedimpr.adaptation.alignments import CDAN, DANN, MMD, Coral
from fedimpr.adaptation.batch_norm import reestimate, restore, statistics_of, unremembered
from fedimpr.adaptation.consensus import Consensus, KnowledgeVote, source_weights
from fedimpr.adaptation.discrepancy import MultiKernelMMD, coral, mmd
from fedimpr.adaptation.information import information_loss, pseudo_labels
from fedimpr.adaptation.kd3a import KD3A
from fedimpr.adaptation.label_spreading import LabelSpreading
from fedimpr.adaptation.learning import Adaptation, Given, SourceImpressions, TargetStatistics, TargetTraining
from fedimpr.adaptation.oracle import Oracle
from fedimpr.adaptation.self_training import SelfTraining
from fedimpr.adaptation.shot import Shot
from fedimpr.adaptation.spreading import Spreading, evened, levelled
from fedimpr.adaptation.usefulness import Survey, survey, usefulness

__all__ = [
    "CDAN",
    "DANN",
    "KD3A",
    "MMD",
    "Adaptation",
    "Aligned",
    "Consensus",
    "Coral",
    "Discriminator",
    "Given",
    "KnowledgeVote",
    "LabelSpreading",
    "MultiKernelMMD",
    "Oracle",
    "SelfTraining",
    "Shot",
    "Spreading",
    "SourceImpressions",
    "Survey",
    "TargetStatistics",
    "TargetTraining",
    "cdan",
    "certainty",
    "coral",
    "dann",
    "evened",
    "information_loss",
    "levelled",
    "mmd",
    "multilinear",
    "pseudo_labels",
    "reestimate",
    "restore",
    "reversal_strength",
    "reverse",
    "source_weights",
    "statistics_of",
    "survey",
    "unremembered",
    "usefulness",
]
