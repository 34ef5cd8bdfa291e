"""The full matrix of disturbed runs: `python -m tests.e2e.run_exact`, or `make exact`.

Every case is one line; the last line counts. `--cases` takes words that a case's name must contain.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pydoc_data.topics
import sys
import tempfile
import time
from pathlib import Path

import trio
from rich.console import Console
from rich.progress import Progress

from p2ptrain.runtime.reports import TrainResult
from tests.e2e.exact_cases import Case, matrix, run_case, undisturbed_run
from tests.e2e.peers import ROOT


def main() -> int:
    """Run the chosen cases; 0 when all of them have the bits of the undisturbed run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="*", default=[], metavar="WORD")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    cases = [case for case in matrix() if all(word in str(case) for word in chosen.cases)]
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as shown:
        os.environ["XDG_RUNTIME_DIR"] = folder
        directory = Path(folder)
        text = directory / "english.txt"
        topics = pydoc_data.topics.topics
        text.write_text("\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
        (directory / "undisturbed").mkdir()
        alone = trio.run(functools.partial(undisturbed_run, directory / "undisturbed", text))
        task = shown.add_task("cases", total=len(cases))
        rows = []
        for index, case in enumerate(cases):
            rows.append(one(case, directory / f"case-{index}", text, alone))
            shown.console.print(f"{case}: {rows[-1]['outcome']}")
            shown.update(task, advance=1)
    failed = [row for row in rows if not row["exact"]]
    if chosen.json:
        print(json.dumps({"version": 1, "cases": rows}))
    print(f"{len(rows) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


def one(case: Case, directory: Path, text: Path, alone: TrainResult) -> dict[str, object]:
    """One case's row; a failure says what did not hold."""
    directory.mkdir()
    began_s = time.monotonic()
    try:
        outcome = trio.run(functools.partial(run_case, case, directory, text, alone))
    except (Exception, ExceptionGroup) as error:
        said = " ".join(str(_leaf(error)).split())[:200]
        seconds = time.monotonic() - began_s
        return {"case": str(case), "exact": False, "outcome": f"FAILED: {said}", "seconds": seconds}
    said = f"exact, {outcome.seconds:.0f} s, {len(outcome.replayed)} steps replayed"
    return {"case": str(case), "exact": True, "outcome": said, "seconds": outcome.seconds}


def _leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    sys.exit(main())
