"""The private folders of adapters that come as bytes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from loramux.adapters.spool import Spool


def test_folders_are_private_apart_and_gone_at_the_end(tmp_path: Path) -> None:
    spool = Spool()
    assert spool.folders() == [] and not spool.owns(str(tmp_path))
    one, two = spool.folder(), spool.folder()
    assert one != two and one.parent == two.parent
    for folder in (one, one.parent):
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    (one / "weights").write_bytes(b"x")
    spool.drop(str(one))
    spool.drop(str(one))
    assert not one.exists() and spool.folders() == [two.name]
    spool.close()
    assert not two.parent.exists()


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    spool = Spool()
    inside = spool.folder()
    (inside / "deep").mkdir()
    for folder in (tmp_path, inside.parent, inside / "deep", inside / ".." / "..", inside / ".."):
        assert not spool.owns(str(folder))
        spool.drop(str(folder))
        assert folder.exists()
    spool.close()
