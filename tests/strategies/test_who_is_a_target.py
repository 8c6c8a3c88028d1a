"""Which clients are targets."""

from __future__ import annotations

import pytest

from fedimpr.errors import ConfigError
from strategies.targets import sources_of, targets_of

DOMAINS = {"photo": [0, 3], "sketch": [1]}  # client 2 holds both


def test_targets_are_named_by_domain_or_number() -> None:
    assert targets_of(["photo"], {}, DOMAINS, 4) == {0: 1, 3: 1}
    assert targets_of([2, "sketch"], {}, DOMAINS, 4) == {1: 1, 2: 1}
    assert targets_of(["2"], {}, {}, 4) == {2: 1}


def test_targets_may_join_later() -> None:
    assert targets_of(["photo", 1], {"photo": 5, "3": 2}, DOMAINS, 4) == {0: 5, 1: 1, 3: 2}


@pytest.mark.parametrize(
    ("targets", "joins", "told"),
    [
        (["desert"], {}, r"'strategy.targets' is 'desert'; allowed: a domain that has clients of its own \(photo, sketch\), or a client's"),
        ([4], {}, r"'strategy.targets' is 4; allowed: .* or a client's number in \[0, 4\)"),
        ([-1], {}, r"'strategy.targets' is -1"),
        ([], {}, r"'strategy.targets' is \[\]; allowed: one domain or client"),
        (["photo", "sketch", 2], {}, r"allowed: not all of the 4 clients"),
        (["sketch"], {"photo": 3}, r"'strategy.joins' is 'photo'; allowed: one of strategy.targets"),
        (["sketch"], {"sketch": 0}, r"'strategy.joins.sketch' is 0; allowed: a round"),
    ],
)
def test_what_names_no_target_is_refused(targets: list, joins: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        targets_of(targets, joins, DOMAINS, 4)


def test_without_domains_only_numbers_name_clients() -> None:
    with pytest.raises(ConfigError, match="with this data set, which has no domains, or a client's number"):
        targets_of(["photo"], {}, {}, 4)


def test_sources_are_all_others_or_those_that_are_named() -> None:
    assert sources_of(None, {1}, DOMAINS, 4) == [0, 2, 3]
    assert sources_of(["photo"], {1}, DOMAINS, 4) == [0, 3]
    with pytest.raises(ConfigError, match="'strategy.sources' is .*; allowed: clients that are no targets, and client 1 is one"):
        sources_of([0, 1], {1}, DOMAINS, 4)
    with pytest.raises(ConfigError, match=r"'strategy.sources' is \[\]; allowed: one domain or client"):
        sources_of([], {1}, DOMAINS, 4)
