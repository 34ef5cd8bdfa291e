"""Keep backwards in two parts only where they give the bits of the whole ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.graph.check import check_masks, check_values
from p2ptrain.graph.export import Bundle
from p2ptrain.graph.runner import Runner
from p2ptrain.graph.source import Source


def settle_parts(source: Source, bundle: Bundle) -> Bundle:
    """The bundle, without backwards in parts if any gradient of theirs has other bits.

    A runtime may fuse nodes of the whole graph that the cut tells apart. Such a model is trained
    with whole backwards under every schedule.
    """
    manifest = bundle.manifest
    runner = Runner(manifest=manifest, files=bundle.files)
    values = check_values(source, manifest)
    masks = check_masks(manifest, source.example, masked=True)
    whole, parts = (
        runner.step(
            form="portable",
            parameters=values,
            inputs=source.example,
            masks=masks,
            in_parts=in_parts,
        ).gradients
        for in_parts in (False, True)
    )
    equal = all(np.array_equal(parts[name], gradient) for name, gradient in whole.items())
    return bundle if equal else _without_parts(bundle)


def _without_parts(bundle: Bundle) -> Bundle:
    kinds = {
        name: replace(
            kind,
            forms={form: replace(pair, parts=None) for form, pair in kind.forms.items()},
        )
        for name, kind in bundle.manifest.kinds.items()
    }
    manifest = replace(bundle.manifest, kinds=kinds)
    kept = _referred(manifest)
    return replace(
        bundle,
        manifest=replace(
            manifest, graphs={d: file for d, file in manifest.graphs.items() if d in kept}
        ),
        files={digest: content for digest, content in bundle.files.items() if digest in kept},
    )


def _referred(manifest: Manifest) -> set[str]:
    pairs = [pair for kind in manifest.kinds.values() for pair in kind.forms.values()]
    graphs: set[str] = {digest for pair in pairs for digest in pair.graphs}
    graphs |= {kind.evaluation for kind in manifest.kinds.values() if kind.evaluation is not None}
    graphs |= {digest for sharding in manifest.sharding.values() for digest in sharding.graphs}
    return {*graphs, *(rule.graph for rule in manifest.updates.values()), manifest.inference.graph}
