"""The repository as the architecture tests see it: its root, its sources, its tracked files."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src" / "loramux").rglob("*.py"))


def tracked_files() -> list[Path]:
    """What is in the repository, or would be: untracked files that git does not ignore count too.

    Without git (an unpacked archive) everything that is not in a hidden folder.
    """
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        found = [path for path in ROOT.rglob("*") if path.is_file()]
        return [p for p in found if not any(part[0] == "." for part in p.relative_to(ROOT).parts)]
    paths = [ROOT / name for name in done.stdout.split("\0") if name]
    return sorted(path for path in paths if path.is_file())
