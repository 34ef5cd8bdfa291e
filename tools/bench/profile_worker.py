"""Time every distinct segment in this interpreter and print one JSON line; run by the benchmark."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from p2ptrain.engine.onnxruntime_engine import open_engine, runtime_build
from p2ptrain.runtime.compute.profiling import profile_kinds
from p2ptrain.store.bundles import load_bundle
from p2ptrain.wire.codec import to_plain


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--form", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    engine = open_engine(threads=options.threads)
    bundle = load_bundle(options.bundle)
    costs = profile_kinds(
        engine, bundle, options.form, options.batch, options.repeats, in_parts=True
    )
    document = {
        "kinds": {kind: to_plain(cost) for kind, cost in costs.items()},
        "build": to_plain(runtime_build()),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
