"""The README's program and its names work as they are printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import p2ptrain
from p2ptrain.store.groups import create_group
from p2ptrain.store.home import open_home

README = Path(p2ptrain.__file__).resolve().parents[1] / "README.md"
SECONDS_MAX = 240


def test_program_in_the_readme_trains(tmp_path: Path) -> None:
    """As printed, but for the number of steps, in a folder that holds only the text."""
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    home, work = tmp_path / "state", tmp_path / "work"
    work.mkdir()
    create_group(open_home(home), "home", "a passphrase for the test", "laptop")
    (work / "notes.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    program = work / "program.py"
    program.write_text(block.replace("steps=500", "steps=2"))
    ran = subprocess.run(
        [sys.executable, str(program)],
        cwd=work,
        env={"P2PTRAIN_HOME": str(home), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        | (
            {"PYTHONPATH": str(README.parent)}
            if (README.parent / "pyproject.toml").exists()
            else {}
        ),
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS_MAX,
    )
    assert ran.returncode == 0, ran.stderr
    assert 0.0 < float(ran.stdout) < 6.0
