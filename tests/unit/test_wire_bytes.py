"""Predicted wire bytes, against the published arithmetic for BERT-base on four devices."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.bundle.reading import parse_manifest
from p2ptrain.bundle.shard_traffic import shard_traffic
from p2ptrain.planner.explore import Explorer
from p2ptrain.planner.kinds import Kind
from p2ptrain.planner.pricing import Pricing
from p2ptrain.planner.profile import KindCost
from p2ptrain.planner.segment_costs import model_costs
from p2ptrain.planner.sharded import Sharded, ShardedPricing
from p2ptrain.planner.traffic import all_reduce_bytes, gather_bytes
from p2ptrain.store.bundles import find_bundle, load_bundle
from tests.planning_cases import profile
from tests.planning_questions import LAYERS, bert_base, bert_question, devices, ending_slowly

EXPORTED = Path(__file__).parents[1] / "interop" / "golden" / "manifest-bert-base.json"
"""Exported from BERT-base's configuration for 32 positions: vocabulary 21,128, but two layers,
and a classification of tokens, since one of texts reads a single position."""


def test_description_has_the_parameters_of_bert_base() -> None:
    assert bert_base(sequence=32).parameter_count == pytest.approx(102.3e6, rel=0.001)


def test_pipeline_sends_one_activation_and_one_cotangent_over_each_boundary() -> None:
    question = bert_question("abcd", "pipeline")
    costs = model_costs(question.manifest, question.contract)
    crossing = {(s.sent_bytes + s.returned_bytes) * 4 for s in costs.segments[:-1]}
    assert len(crossing) == 1
    assert crossing.pop() == pytest.approx(3.15e6, rel=0.01)
    pricing = Pricing(question)
    arrangement = pricing.arrange(((0,), (1,), (2,), (3,)), "1f1b")
    assert arrangement is not None
    sent = [share.sent_bytes for share in pricing.shares(arrangement, (7, 13, 19, 26))]
    assert sum(sent) == pytest.approx(3 * 3.15e6, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "megabytes", "seconds"),
    [("tensor", 113, 9.1), ("data", 614, 49), ("sequence", 670, 54)],
)
def test_bytes_per_peer_and_step(kind: Kind, megabytes: float, seconds: float) -> None:
    pricing = Pricing(bert_question("abcd", kind))
    if kind == "data":
        arrangement = pricing.arrange(((0, 1, 2, 3),), "1f1b")
        assert arrangement is not None
        price = pricing.price(arrangement, (26,))
    else:
        price = ShardedPricing(pricing).price(Sharded(kind=kind, devices=(0, 1, 2, 3)))
    for share in price.shares:
        assert share.sent_bytes == pytest.approx(megabytes * 1e6, rel=0.01)
    compute_ns = max(share.compute_ns for share in price.shares)
    assert (price.step_ns - compute_ns) / 1e9 == pytest.approx(seconds, rel=0.02)


def test_slow_links_favour_the_pipeline_and_one_device() -> None:
    times = {}
    kinds: tuple[Kind, ...] = ("one device", "pipeline", "data", "tensor", "sequence")
    for kind in kinds:
        best = Explorer(Pricing(bert_question("abcd", kind))).run().best
        assert best is not None
        times[kind] = best.price.step_ns
    assert times["pipeline"] < times["one device"] < times["tensor"] < times["data"]


def test_rings_send_what_they_should() -> None:
    assert all_reduce_bytes(400, 4) == 600
    assert all_reduce_bytes(400, 1) == 0
    assert gather_bytes(401, 4) == 301


@pytest.mark.parametrize("kind", ["tensor", "sequence"])
@pytest.mark.parametrize("weights", [(1, 1), (2, 1)])
def test_a_bundle_that_tells_how_it_is_divided_is_taken_at_its_word(
    kind: Kind, weights: tuple[int, int]
) -> None:
    bundle = load_bundle(find_bundle("gpt-nano"))
    peers = [
        dataclasses.replace(
            profile(letter, []),
            kinds=dict.fromkeys(
                bundle.manifest.kinds, KindCost(forward_ns=10**6, backward_ns=10**6)
            ),
        )
        for letter in "ab"
    ]
    asked = dataclasses.replace(
        bert_question("ab", kind), manifest=bundle.manifest, devices=devices(peers)
    )
    price = ShardedPricing(Pricing(asked)).price(
        Sharded(kind=kind, devices=(0, 1), weights=weights)
    )
    told = shard_traffic(bundle.manifest, kind, batch=4)
    each = [cost for own in told for cost in (*own.forward, *own.backward)]
    whole = 4 * sum(cost.ring_bytes(2) for cost in each)
    whole += all_reduce_bytes(sum(own.step_bytes for own in told), 2)
    sent = [share.sent_bytes for share in price.shares]
    assert sum(sent) == pytest.approx(2 * whole, rel=1e-3)


@pytest.mark.parametrize(("kind", "megabytes"), [("tensor", 113), ("sequence", 670)])
def test_bert_base_as_exported_sends_what_is_published(kind: Kind, megabytes: float) -> None:
    manifest = bert_base_as_exported()
    assert manifest.parameter_count == pytest.approx(102.3e6, rel=0.01)
    peers = [
        dataclasses.replace(
            profile(letter, []),
            kinds=dict.fromkeys(manifest.kinds, KindCost(forward_ns=10**6, backward_ns=10**6)),
        )
        for letter in "abcd"
    ]
    asked = dataclasses.replace(
        bert_question("abcd", kind), manifest=manifest, devices=devices(peers)
    )
    price = ShardedPricing(Pricing(asked)).price(Sharded(kind=kind, devices=(0, 1, 2, 3)))
    for share in price.shares:
        assert share.sent_bytes == pytest.approx(megabytes * 1e6, rel=0.01)


def bert_base_as_exported() -> Manifest:
    """What the exporter says of two layers of BERT-base, with the first one ten times more; the
    last one is another, as nothing needs the mask after it."""
    small = parse_manifest(EXPORTED.read_bytes())
    layer = small.segments[1:3]
    assert {segment.kind for segment in layer} == {"attention", "layer"}
    segments, tensors = [], []
    for number in range(2, LAYERS):
        for segment in layer:
            names = {name: f"{old}.{number}" for name, old in segment.parameters.items()}
            copied = f"{segment.name}.{number}"
            segments.append(dataclasses.replace(segment, name=copied, parameters=names))
            tensors += [
                dataclasses.replace(small.tensor(old), name=names[name])
                for name, old in segment.parameters.items()
            ]
    return dataclasses.replace(
        small,
        segments=(*small.segments[:3], *segments, *small.segments[3:]),
        tensors=(*small.tensors, *tensors),
    )


def test_what_a_shard_tells_of_a_step_is_priced_without_its_update() -> None:
    asked = bert_question("ab", "tensor")
    rated = [ending_slowly(each, norm_ns=10**5, update_ns=10**6) for each in asked.devices]
    shared = Sharded(kind="tensor", devices=(0, 1))
    plain = ShardedPricing(Pricing(asked)).price(shared)
    price = ShardedPricing(Pricing(dataclasses.replace(asked, devices=tuple(rated)))).price(shared)
    assert price.step_ns > plain.step_ns
    for rank in (0, 1):
        assert price.shares[rank].passes_ns == plain.shares[rank].passes_ns
        assert price.shares[rank].passes_ns < price.shares[rank].compute_ns
