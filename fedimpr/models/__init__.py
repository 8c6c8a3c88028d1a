"""The networks of the papers, built by name; images come in as [0, 1], logits go out."""

from fedimpr.models.classifier import Classifier, build, final_layer, in_every_turn, names, rebuild
from fedimpr.models.inheriting import inherit
from fedimpr.models.pretrained import load_pretrained

__all__ = ["Classifier", "build", "final_layer", "in_every_turn", "inherit", "load_pretrained", "names", "rebuild"]
