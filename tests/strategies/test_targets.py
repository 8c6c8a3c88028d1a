"""Which clients are targets."""

from __future__ import annotations

import pytest

from fedimpr.errors import ConfigError
from strategies.targets import targets_of

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
