"""Labelled real images: where they come from and how they are dealt to the clients."""

from fedimpr.data.images import Dataset, Images
from fedimpr.data.loading import load

__all__ = ["Dataset", "Images", "load"]
