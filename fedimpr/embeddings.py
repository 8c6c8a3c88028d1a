"""Embeddings of the names of classes, which the user brings in a file.

Names, and a language model that embeds them, are knowledge that no teacher holds, so nothing here makes them up. A file holds one tensor,
``embeddings`` (K, E), a row for each class in the data set's own order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedimpr.errors import ConfigError


def read_embeddings(file: str) -> Tensor:
    """The embeddings (K, E) in a file.

    Raises:
        ConfigError: there is no such file, or no finite tensor ``embeddings`` of two dimensions in it.
    """
    try:
        found = load_file(file)["embeddings"].float()
    except (OSError, SafetensorError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError("embeddings", file, f"null, or a safetensors file with a tensor 'embeddings' ({reason})") from None
    if found.dim() != 2 or not bool(found.isfinite().all()):
        raise ConfigError("embeddings", file, f"a file with finite embeddings (classes, size); they are {tuple(found.shape)}")
    return found


def of_outputs(embeddings: Tensor, classes: Sequence[int], quarters: int) -> Tensor:
    """(J * Q, E): the rows of the outputs of a network that knows J classes in Q turns; output ``Q k + q`` is class k in turn q.

    A class in another turn has the same numbers in another order, the same one for all classes: what two names have in common stays, and a
    class in one turn differs from itself in another.

    Args:
        embeddings: (K, E).
        classes: the row of each class that the network knows.
        quarters: Q; 1 where it knows them upright alone.
    """
    rows = embeddings[torch.tensor(classes)]
    return torch.stack([rows.roll(q * rows.shape[1] // quarters, 1) for q in range(quarters)], 1).flatten(0, 1)
