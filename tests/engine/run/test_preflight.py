"""What preflight makes of what ranks found: each kind of fault, and who is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from paralign.engine.run.preflight.device import Product
from paralign.engine.run.preflight.disk import Disk
from paralign.engine.run.preflight.host import Host
from paralign.engine.run.preflight.links import Link
from paralign.engine.run.preflight.verdict import Rank, judge

ROOM = 10**12


def healthy(nodes: int = 4, per_node: int = 2) -> list[Rank]:
    """tp over the ranks of a node, dp over nodes."""
    found = []
    for number in range(nodes * per_node):
        node, local = divmod(number, per_node)
        host = Host(
            f"gpu{node}",
            local,
            "H100",
            f"uuid{number}",
            {"torch": "2.11"},
            (900, 1000),
            (5.0 + number / 1e4,) * 3,
        )
        links = {
            "tp": Link(tuple(range(node * per_node, (node + 1) * per_node)), 300.0, True),
            "dp": Link(tuple(range(local, nodes * per_node, per_node)), 40.0, True),
        }
        found.append(Rank(host, Product(600.0, "d1", True), links, Disk(2 * ROOM, "", ())))
    return found


def test_healthy_nodes_have_no_findings() -> None:
    assert judge(healthy(), ROOM) == []
    assert judge(healthy(1, 1), ROOM) == []


def _host(rank: Rank, **changes: Any) -> Rank:
    return replace(rank, host=replace(rank.host, **changes))


def _disk(rank: Rank, **changes: Any) -> Rank:
    return replace(rank, disk=replace(rank.disk, **changes))


def _product(rank: Rank, **changes: Any) -> Rank:
    return replace(rank, product=replace(rank.product, **changes))


@pytest.mark.parametrize(
    ("faults", "nodes", "text"),
    [
        (
            {5: lambda r: _product(r, tflops=350.0)},
            "gpu2",
            "rank 5 multiplies at 350 TFLOP/s, where H100 here",
        ),
        (
            {5: lambda r: _product(r, digest="d2")},
            "gpu2",
            "rank 5 multiplies to another result than the other 7",
        ),
        (
            {5: lambda r: _product(r, steady=False)},
            "gpu2",
            "rank 5 multiplies the same matrices to different",
        ),
        (
            {n: lambda r: _host(r, versions={"torch": "2.10"}) for n in (6, 7)},
            "gpu3",
            "ranks 6, 7 has torch 2.10, and the others 2.11",
        ),
        ({n: lambda r: _host(r, device_id="same") for n in (2, 3)}, "gpu1", "ranks 2, 3 share one GPU"),
        (
            {n: lambda r: _host(r, clock=(8.0, 8.1, 8.2)) for n in (2, 3)},
            "gpu1",
            "its clock is 3.0 s ahead of the median of nodes",
        ),
        ({n: lambda r: _host(r, memory=(300, 1000)) for n in (2, 3)}, "gpu1", "0 GB of memory are free"),
        ({4: lambda r: _disk(r, unseen=(0,))}, "gpu2", "rank 4 and rank 0 do not see each other's files"),
        ({0: lambda r: _disk(r, unseen=(4, 5))}, "gpu2", "ranks 4, 5 and rank 0 do not see"),
        (
            {4: lambda r: _disk(r, refused="x: Read-only file system", unseen=(0,))},
            "gpu2",
            "rank 4 cannot write run_dir: x: Read-only",
        ),
        ({1: lambda r: _disk(r, free=ROOM - 1)}, "gpu0", "finds 1000.0 GB free in run_dir"),
        (
            {
                n: lambda r: replace(r, links=r.links | {"tp": replace(r.links["tp"], gb_per_second=90.0)})
                for n in (4, 5)
            },
            "gpu2",
            "ranks 4, 5 talk at 90 GB/s over tp, where the median of groups is 300",
        ),
        (
            {3: lambda r: replace(r, links=r.links | {"dp": replace(r.links["dp"], right=False)})},
            "gpu1",
            "rank 3 got wrong numbers over dp",
        ),
    ],
)
def test_a_fault_is_found_alone_and_its_node_named(faults: dict[int, Any], nodes: str, text: str) -> None:
    ranks = healthy()
    for number, fault in faults.items():
        ranks[number] = fault(ranks[number])
    [finding] = judge(ranks, ROOM)
    assert finding.nodes == (nodes,)
    assert text in str(finding)


def test_two_results_of_two_devices_name_both() -> None:
    ranks = healthy(1, 2)
    ranks[1] = _product(ranks[1], digest="d2")
    [finding] = judge(ranks, ROOM)
    assert "ranks 0, 1 multiply the same matrices to results that differ" in str(finding)
