"""Folders for adapters that came as bytes: private to this user, gone with their version."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from pathlib import Path


class Spool:
    """One private folder of this process, made when it is first needed, with a folder an adapter."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._root: str | None = None

    def folder(self) -> Path:
        """A new empty folder that only this user can enter. Raises OSError."""
        with self._lock:
            if self._root is None:
                self._root = tempfile.mkdtemp(prefix="loramux-adapters-")
            return Path(tempfile.mkdtemp(dir=self._root))

    def owns(self, folder: str) -> bool:
        return self._root is not None and os.path.dirname(os.path.abspath(folder)) == self._root

    def drop(self, folder: str) -> None:
        """Delete a folder that is ours; any other is left alone."""
        if self.owns(folder):
            shutil.rmtree(folder, ignore_errors=True)

    def folders(self) -> list[str]:
        return sorted(os.listdir(self._root)) if self._root is not None else []

    def close(self) -> None:
        with self._lock:
            root, self._root = self._root, None
        if root is not None:
            shutil.rmtree(root, ignore_errors=True)
