"""Where a name that is not known yet may be looked up: below allow-listed roots, in allow-listed
repositories, and nowhere else. Torch-free.

    name --is_adapter_name--> root/name for each root, then the repository, if a pattern fits

Names are a stranger's. They are taken as they are or not at all: what `types.is_adapter_name` refuses
is not looked up, so no name holds `..`, a leading slash, a character outside ASCII or a NUL. A name
never chooses a revision: anybody can put files into a pull request of a repository, and every commit
of it has a revision.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from loramux.adapters.peft_config import CONFIG_NAME
from loramux.adapters.sources import LocalFolder, RemoteFolder, parse_source
from loramux.errors import ConfigError, LoramuxError
from loramux.types import is_adapter_name

logger = logging.getLogger(__name__)

MOST_REFUSALS = 10_000


class Resolver:
    """Names into sources. `find` blocks on the file system, and asks no other machine."""

    def __init__(self, roots: Sequence[str], repositories: Sequence[str]):
        """Raises ConfigError for a root that is no directory."""
        self._folders: list[str] = []  # real paths
        self._urls: list[str] = []
        self._repositories = list(repositories)
        for root in roots:
            source = parse_source(root)
            if isinstance(source, RemoteFolder):
                self._urls.append(source.url)
            elif isinstance(source, LocalFolder) and source.path.is_dir():
                self._folders.append(os.path.realpath(source.path))
            else:
                raise ConfigError(
                    f"the adapter root {root!r} is no directory",
                    field="adapter_roots",
                    remedy="create it, or name another with --adapter-roots",
                )

    def find(self, name: str) -> list[str]:
        """Sources that `name` may mean, in the order in which they are tried: a folder that is there
        alone, else places that must be asked. Empty for a name that nothing allows."""
        if not is_adapter_name(name):
            return []
        for root in self._folders:
            if (folder := _folder_below(root, name)) is not None:
                return [folder]
        found = [f"{url}/{name}" for url in self._urls]
        for pattern in self._repositories:
            repository, at, revision = pattern.partition("@")
            if "@" not in name and fnmatch.fnmatchcase(name, repository) and name.count("/") == 1:
                found.append(f"hf://{name}{at}{revision}")
                break
        return found


def _folder_below(root: str, name: str) -> str | None:
    """The real path of `root`/`name` if it is there and lies inside `root` with all its files."""
    try:
        real = os.path.realpath(os.path.join(root, name))
        if not _is_inside(real, root) or not os.path.isfile(os.path.join(real, CONFIG_NAME)):
            return None
        for entry in os.scandir(real):
            if not _is_inside(os.path.realpath(entry.path), root):
                logger.warning("adapter %r has a link that leaves its root; not served", name)
                return None
    except (OSError, ValueError):  # too long, a loop of links, no permission
        return None
    return real


def _is_inside(real: str, root: str) -> bool:
    return real != root and os.path.commonpath([real, root]) == root


class Refusals:
    """What was said of names, for a short time. Safe to call from any thread."""

    def __init__(self, ttl_s: float, clock: Callable[[], float] = time.monotonic):
        self._ttl_s = ttl_s
        self._clock = clock
        self._lock = threading.Lock()
        self._said: OrderedDict[str, tuple[float, LoramuxError]] = OrderedDict()  # oldest first

    def get(self, name: str) -> LoramuxError | None:
        """The error to answer with, or None where the name must be looked up."""
        with self._lock:
            said_s, error = self._said.get(name, (0.0, None))
            if error is None or self._clock() - said_s < self._ttl_s:
                return error
            del self._said[name]
            return None

    def put(self, name: str, error: LoramuxError) -> None:
        with self._lock:
            self._said.pop(name, None)
            self._said[name] = (self._clock(), error)
            while len(self._said) > MOST_REFUSALS:
                self._said.popitem(last=False)

    def drop(self, name: str) -> None:
        with self._lock:
            self._said.pop(name, None)
