"""The full matrix of disturbed runs: `python -m tests.e2e.run_exact`, or `make exact`.

Every case is one line; the last line counts. `--cases` takes words that a case's name must contain.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import pydoc_data.topics
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import trio
from rich.console import Console
from rich.progress import Progress

from tests.e2e.exact_cases import Case, Undisturbed, matrix, run_case, undisturbed_runs
from tests.e2e.peers import ROOT


def main() -> int:
    """Run the chosen cases; 0 when all of them have the bits of the undisturbed run."""
    chosen = arguments().parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    commit = commit_of_tree()
    known = {} if chosen.record is None else recorded(chosen.record, commit)
    number, count = chosen.share
    named = [case for case in matrix() if all(word in str(case) for word in chosen.cases)]
    cases = named[number - 1 :: count]
    rows = [known[str(case)] for case in cases if str(case) in known]
    with workplace(chosen.keep) as directory, Progress(console=Console(stderr=True)) as shown:
        text = directory / "english.txt"
        topics = pydoc_data.topics.topics
        text.write_text("\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
        (directory / "undisturbed").mkdir()
        alone = trio.run(functools.partial(undisturbed_runs, directory / "undisturbed", text))
        task = shown.add_task("cases", total=len(cases), completed=len(rows))
        for case in (case for case in cases if str(case) not in known):
            row = {"commit": commit, **one(case, directory / str(case), text, alone)}
            rows.append(row)
            if chosen.record is not None:
                with chosen.record.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")
            shown.console.print(f"{case}: {row['outcome']}")
            shown.update(task, advance=1)
    failed = [row for row in rows if not row["exact"]]
    if chosen.json:
        print(json.dumps({"version": 1, "cases": rows}))
    print(f"{len(rows) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


def arguments() -> argparse.ArgumentParser:
    """What may be typed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="*", default=[], metavar="WORD")
    parser.add_argument(
        "--share",
        type=lambda given: tuple(map(int, given.split("/"))),
        default=(1, 1),
        metavar="N/COUNT",
        help="only every COUNT-th case, from the N-th on, so that several can share the matrix",
    )
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="append each result as a line of JSON; what was exact at this commit is not run again",
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="leave what peers of failed cases wrote here"
    )
    parser.add_argument("--json", action="store_true")
    return parser


def commit_of_tree() -> str:
    """The commit that is run, marked where the tree differs from it."""
    line = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    ended = subprocess.run(line, capture_output=True, text=True, check=False)
    return ended.stdout.strip() or "unknown"


def recorded(path: Path, commit: str) -> dict[str, dict[str, object]]:
    """The rows of cases that were exact at a commit."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {row["case"]: row for row in rows if row["exact"] and row["commit"] == commit}


@contextlib.contextmanager
def workplace(kept: Path | None) -> Iterator[Path]:
    """A folder for the cases, with a short one for the sockets in it."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder
        if kept is None:
            yield Path(folder)
        else:
            kept.mkdir(parents=True, exist_ok=True)
            yield Path(tempfile.mkdtemp(dir=kept))


def one(case: Case, directory: Path, text: Path, alone: Undisturbed) -> dict[str, object]:
    """One case's row; a failure says what did not hold."""
    directory.mkdir()
    began_s = time.monotonic()
    try:
        outcome = trio.run(functools.partial(run_case, case, directory, text, alone))
    except (Exception, ExceptionGroup) as error:
        said = " ".join(str(_leaf(error)).split())[:200]
        seconds = time.monotonic() - began_s
        return {"case": str(case), "exact": False, "outcome": f"FAILED: {said}", "seconds": seconds}
    shutil.rmtree(directory)
    said = f"exact, {outcome.seconds:.0f} s, {len(outcome.replayed)} steps replayed"
    return {"case": str(case), "exact": True, "outcome": said, "seconds": outcome.seconds}


def _leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    sys.exit(main())
