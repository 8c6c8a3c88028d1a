"""Which clients are targets and which are sources: as settings name them, and as clients."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from fedimpr.errors import ConfigError

Domains = Mapping[str, Sequence[int]]
"""By domain, the clients that hold images of it and of no other."""


def targets_of(targets: Sequence[str | int], joins: Mapping[str, int], domains: Domains, clients: int) -> dict[int, int]:
    """The target clients in order, each with the round from which it takes part.

    Args:
        targets: names of domains, or numbers of clients.
        joins: by target, as named there or by number, the first round it takes part in, >= 1; all others are there from the start.
        domains: who holds what.
        clients: how many there are.

    Raises:
        ConfigError: a name is of no client, every client is a target or none is, or ``joins`` names somebody else.
    """
    found = {client: 1 for target in targets for client in _clients(target, "strategy.targets", domains, clients)}
    if not found:
        raise ConfigError("strategy.targets", list(targets), "one domain or client, or more, that has no labels")
    if len(found) == clients:
        raise ConfigError("strategy.targets", list(targets), f"not all of the {clients} clients: nobody is left to learn the labels from")
    for target, round in joins.items():
        for client in _clients(target, "strategy.joins", domains, clients):
            if client not in found:
                raise ConfigError("strategy.joins", target, "one of strategy.targets: only targets can join later")
            if not isinstance(round, int) or round < 1:
                raise ConfigError(f"strategy.joins.{target}", round, "a round, counted from 1")
            found[client] = round
    return dict(sorted(found.items()))


def sources_of(sources: Sequence[str | int] | None, targets: Collection[int], domains: Domains, clients: int) -> list[int]:
    """The source clients in order; those that are neither take no part.

    Args:
        sources: names of domains, or numbers of clients; ``None``: all that are no targets.
        targets: the target clients.
        domains: who holds what.
        clients: how many there are.

    Raises:
        ConfigError: a name is of no client, there is none, or one of them is a target.
    """
    if sources is None:
        return [client for client in range(clients) if client not in targets]
    found = sorted({client for source in sources for client in _clients(source, "strategy.sources", domains, clients)})
    if not found or (both := [client for client in found if client in targets]):
        reason = (
            "one domain or client, or more, that has labels" if not found else f"clients that are no targets, and client {both[0]} is one"
        )
        raise ConfigError("strategy.sources", list(sources), reason)
    return found


def _clients(target: str | int, key: str, domains: Domains, clients: int) -> Sequence[int]:
    """The clients that a target names."""
    if isinstance(target, str) and target in domains:
        return domains[target]
    number = int(target) if str(target).isdecimal() else -1
    if 0 <= number < clients:
        return [number]
    known = f"a domain that has clients of its own ({', '.join(domains)})" if domains else "with this data set, which has no domains"
    raise ConfigError(key, target, f"{known}, or a client's number in [0, {clients})")
