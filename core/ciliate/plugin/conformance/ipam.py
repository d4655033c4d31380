"""What every address allocation provider must do."""

from __future__ import annotations

import asyncio
from ipaddress import IPv4Network, IPv6Network, ip_address

from ciliate.ipam import ROUTER, IpamConflict, IpamExhausted
from ciliate.plugin.conformance import Case, Stage

RANGE4, RANGE6 = IPv4Network("10.9.0.0/28"), IPv6Network("fd09::/124")
SMALL = {"ipv4_range": RANGE4, "ipv6_range": RANGE6}


def _expect(condition: bool, text: str) -> None:
    if not condition:
        raise AssertionError(text)


async def both_families(stage: Stage) -> None:
    """An allocation has an address of each family, from its range, and neither is the network or the router."""
    ipam = await stage.make(**SMALL)
    got, router = await ipam.allocate("pod"), ipam.router
    _expect(got.ipv4 in RANGE4 and got.ipv6 in RANGE6, f"{got} is outside of the ranges")
    _expect(not {got.ipv4, got.ipv6} & {router.ipv4, router.ipv6}, f"{got} has the router's address")
    edges = {RANGE4.network_address, RANGE4.broadcast_address}
    _expect(got.ipv4 not in edges, f"{got.ipv4} is the network or the broadcast address")
    _expect(ipam.owners()[router.ipv4] == ROUTER, "the router's address has another owner")


async def one_family_only(stage: Stage) -> None:
    """A family that is off, or not asked for, gets no address."""
    ipam = await stage.make(**SMALL, enable_ipv6=False)
    got = await ipam.allocate("pod")
    _expect(got.ipv4 is not None and got.ipv6 is None, f"{got} with IPv6 off")
    both = await stage.make(**SMALL)
    only6 = await both.allocate("other", ipv4=False)
    _expect(only6.ipv4 is None and only6.ipv6 is not None, f"{only6} where only IPv6 was asked for")


async def never_twice(stage: Stage) -> None:
    """No address has two owners, however many ask at once."""
    ipam = await stage.make()
    got = await asyncio.gather(*(ipam.allocate(f"pod{number}") for number in range(100)))
    addresses = [address for allocation in got for address in allocation.addresses]
    _expect(len(addresses) == len(set(addresses)) == 200, f"{len(set(addresses))} different of {len(addresses)}")


async def a_full_range_says_so(stage: Stage) -> None:
    """A full range raises IpamExhausted, keeps nothing of the attempt, and works again after a release."""
    ipam = await stage.make(**SMALL)
    count = 0
    try:
        while count < 20:
            await ipam.allocate(f"pod{count}")
            count += 1
    except IpamExhausted as error:
        _expect(str(RANGE4) in str(error) or "fd09::" in str(error), f"{error} does not name the range")
    _expect(count < 15, f"{count} allocations from a range of 16 addresses")
    _expect(f"pod{count}" not in ipam.owners().values(), "a failed allocation kept an address")
    await ipam.release("pod0")
    await ipam.allocate("again")


async def allocations_survive_a_restart(stage: Stage) -> None:
    """After a restart every address has its owner still, and none is given to another."""
    ipam = await stage.make(**SMALL)
    before = [await ipam.allocate(f"pod{number}") for number in range(5)]
    owners = dict(ipam.owners())
    await stage.end(ipam)
    again = await stage.make(**SMALL)
    _expect(dict(again.owners()) == owners, "owners differ after the restart")
    fresh = await again.allocate("fresh")
    taken = {address for allocation in before for address in allocation.addresses}
    _expect(not taken & set(fresh.addresses), f"{fresh} was given to another before the restart")


async def released_addresses_rest(stage: Stage) -> None:
    """An address that was released is not the next one to be given."""
    ipam = await stage.make(**SMALL)
    first = await ipam.allocate("first")
    _expect(await ipam.release("first"), "release gave False for an owner")
    _expect(not await ipam.release("first"), "release gave True for an owner without addresses")
    second = await ipam.allocate("second")
    _expect(first.ipv4 != second.ipv4, f"{first.ipv4} was given again at once")


async def owners_are_exclusive(stage: Stage) -> None:
    """A second allocation for one owner, and a claim of another's address, raise IpamConflict."""
    ipam = await stage.make(**SMALL)
    got = await ipam.allocate("pod")
    for attempt in (ipam.allocate("pod"), ipam.claim("thief", got.addresses)):
        try:
            await attempt
        except IpamConflict:
            continue
        raise AssertionError("it was allowed, expected IpamConflict")
    await ipam.claim("pod", got.addresses)
    await ipam.claim("restored", [ip_address("10.9.0.9")])
    _expect(ipam.owners()[ip_address("10.9.0.9")] == "restored", "a claimed address has another owner")


async def a_huge_range_costs_nothing(stage: Stage) -> None:
    """An IPv6 /64 is as quick as a /120."""
    ipam = await stage.make(ipv6_range=IPv6Network("fd09::/64"))
    async with asyncio.timeout(2):
        await ipam.allocate("pod")
    _expect(ipam.capacity() > 0, "capacity is not positive")


CASES: list[Case] = [
    both_families,
    one_family_only,
    never_twice,
    a_full_range_says_so,
    allocations_survive_a_restart,
    released_addresses_rest,
    owners_are_exclusive,
    a_huge_range_costs_nothing,
]
