"""Sizes of packets from option, links and tunnels. Tier unit."""

import pytest

from ciliate.mtu import Mtu, fit


@pytest.mark.parametrize(
    ("option", "links", "overhead", "expected"),
    [
        (0, [1500], 0, Mtu(1500, 1500)),
        (0, [9000, 1500], 0, Mtu(1500, 1500)),
        (0, [9000], 50, Mtu(9000, 8950)),
        (0, [1500], 70, Mtu(1500, 1430)),
        (0, [], 0, Mtu(1500, 1500)),
        (0, [0, 1400], 0, Mtu(1400, 1400)),
        (0, [1300], 70, Mtu(1300, 1280)),
        (0, [65536], 0, Mtu(65536, 65520)),
        (1400, [9000], 50, Mtu(9000, 1400)),
    ],
)
def test_fit(option: int, links: list[int], overhead: int, expected: Mtu) -> None:
    assert fit(option, links, overhead) == expected
