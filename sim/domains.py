"""Which clients live in which domain."""

from __future__ import annotations

from fedimpr.data import Images
from fedimpr.data.partition import Partition


def domains_of(train: Images, partition: Partition) -> dict[str, list[int]]:
    """By domain, the clients that hold images of it and of no other; nothing where the data set has no domains.

    Args:
        train: all training images.
        partition: who holds which of them.
    """
    if train.domains is None:
        return {}
    clients: dict[str, list[int]] = {name: [] for name in train.domain_names}
    for client, indices in enumerate(partition.indices):
        held = train.domains[indices].unique().tolist()
        if len(held) == 1:
            clients[train.domain_names[held[0]]].append(client)
    return {name: found for name, found in clients.items() if found}
