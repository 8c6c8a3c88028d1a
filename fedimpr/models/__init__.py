"""The networks of the papers, built by name; images come in as [0, 1], logits go out."""

from fedimpr.models.classifier import Classifier, build, final_layer, in_every_turn, names, rebuild

__all__ = ["Classifier", "build", "final_layer", "in_every_turn", "names", "rebuild"]
