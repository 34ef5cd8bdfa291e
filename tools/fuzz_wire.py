"""Fuzz the readers of hostile bytes, guided by coverage; on demand, needs `pip install atheris`.

    python tools/fuzz_wire.py [--seconds 60] [--target message ...] [--keep]

Each target runs for its share of the seconds, in a process of its own, from the seeds and the
corpus in `tools/fuzz/corpus`. An input that raises what it should not, takes more memory than it
may or longer than 5 s is printed in hex with the command that runs it again; the exit code is
then 1. `--keep` adds inputs that reached new code to the corpus, which `make test` replays.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
INPUT_SECONDS_MAX: Final = 5
MEMORY_MIB_MAX: Final = 1024
KEPT_BYTES_MAX: Final = 600
"""Longer inputs are not kept: the corpus is read by people too."""
KEPT_MAX: Final = 60
TOLD: Final = ("stat::number_of_executed_units", "stat::new_units_added", "stat::peak_rss_mb")


def main() -> int:
    """Run the campaigns one after the other; 0 when nothing was found."""
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60, help="for all targets together")
    parser.add_argument("--target", action="append", help="one target; may be given again")
    parser.add_argument("--keep", action="store_true", help="add what reached new code")
    parser.add_argument("--input", help="run one input, in hex, without a fuzzer")
    parser.add_argument("--one", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        fuzz_here(options.one)
    from tools.fuzz.targets import TARGETS, check

    names = options.target or list(TARGETS)
    if options.input is not None:
        check(TARGETS[names[0]], bytes.fromhex(options.input))
        return 0
    share_s = max(1, options.seconds // len(names))
    results = [campaign(name, share_s, keep=options.keep) for name in names]
    return 0 if all(results) else 1


def campaign(name: str, seconds: int, *, keep: bool) -> bool:
    """Fuzz one target in a process of its own; whether nothing was found."""
    from tools.fuzz.targets import TARGETS, corpus

    with tempfile.TemporaryDirectory() as work:
        seeds, found = Path(work) / "seeds", Path(work) / "found"
        seeds.mkdir()
        found.mkdir()
        for index, data in enumerate(corpus(TARGETS[name])):
            (seeds / f"{index:04}").write_bytes(data)
        command = [
            sys.executable, __file__, "--one", name,
            f"-max_total_time={seconds}", f"-timeout={INPUT_SECONDS_MAX}",
            f"-rss_limit_mb={MEMORY_MIB_MAX}", "-max_len=8192", "-print_final_stats=1",
            f"-artifact_prefix={work}/", str(found), str(seeds),
        ]  # fmt: skip
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        report(name, ended.stdout + ended.stderr)
        findings = [p for p in Path(work).iterdir() if p.is_file()]
        for path in findings:
            print(ended.stdout[-3000:])
            data = path.read_bytes().hex()
            print(f"{path.name}: python tools/fuzz_wire.py --target {name} --input {data}")
        if keep:
            keep_new(name, [path.read_bytes() for path in sorted(found.iterdir())])
    return ended.returncode == 0 and not findings


def report(name: str, output: str) -> None:
    """One line about a campaign, from what libFuzzer printed."""
    facts = [
        line.replace("stat::", "").split(":")
        for line in output.splitlines()
        if line.startswith(TOLD)
    ]
    covered = [line.split("cov:")[1].split()[0] for line in output.splitlines() if "cov:" in line]
    told = ", ".join(f"{key.replace('_', ' ')} {value.strip()}" for key, value in facts)
    print(f"{name}: {told}, places covered {covered[-1] if covered else 'none'}", flush=True)


def keep_new(name: str, inputs: list[bytes]) -> None:
    """Add short inputs to the corpus of a target, shortest first, each once."""
    from tools.fuzz.targets import CORPUS

    path = CORPUS / f"{name}.hex"
    path.parent.mkdir(exist_ok=True)
    lines = path.read_text(encoding="ascii").splitlines() if path.is_file() else []
    new = sorted((data.hex() for data in inputs if 0 < len(data) <= KEPT_BYTES_MAX), key=len)
    kept = list(dict.fromkeys([*lines, *new]))[:KEPT_MAX]
    path.write_text("".join(f"{line}\n" for line in kept), encoding="ascii")


def fuzz_here(arguments: list[str]) -> None:
    """Be the fuzzing process of one target; never returns."""
    try:
        import atheris
    except ImportError:
        raise SystemExit("fuzz_wire: atheris is missing; install it: pip install atheris") from None
    with atheris.instrument_imports(include=["p2ptrain"]):
        from tools.fuzz.targets import TARGETS, check

    target = TARGETS[arguments[0]]
    atheris.Setup([__file__, *arguments[1:]], lambda data: check(target, data))
    atheris.Fuzz()
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
