"""Domain adaptation: the losses and votes by which a model learns from images of a domain without labels."""

from fedimpr.adaptation.adversarial import Discriminator, cdan, certainty, dann, multilinear, reversal_strength, reverse
from fedimpr.adaptation.batch_norm import reestimate, restore, statistics_of
from fedimpr.adaptation.consensus import Consensus, KnowledgeVote, source_weights
from fedimpr.adaptation.discrepancy import MultiKernelMMD, coral, mmd
from fedimpr.adaptation.information import information_loss, pseudo_labels

__all__ = [
    "Consensus",
    "Discriminator",
    "KnowledgeVote",
    "MultiKernelMMD",
    "cdan",
    "certainty",
    "coral",
    "dann",
    "information_loss",
    "mmd",
    "multilinear",
    "pseudo_labels",
    "reestimate",
    "restore",
    "reversal_strength",
    "reverse",
    "source_weights",
    "statistics_of",
]
