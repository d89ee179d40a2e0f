"""Adapters from disk to host memory, in threads of their own: the step loop never waits for a file.

add(name, folder)   read, check, digest -> registry, host cache     (blocks the caller only)
bring(ref, use)     host cache, or read again from the source, then use(weights)   (the reader)

A file that is provably the one that was checked is read again as bytes; any other is checked and
hashed anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from loramux.adapters.downloads import Downloads, Fetched
from loramux.adapters.files import CORES_A_COPIER, cores
from loramux.adapters.heads import Head, head_of
from loramux.adapters.host_cache import HostCache, HostMemory
from loramux.adapters.peft import read_adapter
from loramux.adapters.registry import Registry
from loramux.adapters.self_test import refuse_differing
from loramux.adapters.weights import AdapterSource, AdapterWeights
from loramux.config import LoRAConfig
from loramux.errors import AdapterLoadFailed, AdapterRejected, LoramuxError
from loramux.schema import ModelSchema
from loramux.types import AdapterRef, AdapterStatus

logger = logging.getLogger(__name__)

MOST_CHECKERS = 4


def _compute_alone() -> None:
    """Keep this thread from ever having an OpenMP team, which would slow the step loop's down.

    torch.set_num_threads would do it for every thread, so the runtime is asked itself.
    """
    torch.get_num_threads()  # torch sets this thread's count at first use; do it before us
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).omp_set_num_threads(1)


@dataclass(slots=True)
class _Staged:
    """An adapter that was read and is not served yet; `claim` holds its name."""

    weights: AdapterWeights
    head: Head | None
    load_s: float
    claim: contextlib.ExitStack


def _threads(count: int, name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix=name, initializer=_compute_alone)


class AdapterStore:
    """Registry and host cache over one thread that reads again, and others that check what is new."""

    def __init__(
        self,
        schema: ModelSchema,
        config: LoRAConfig,
        dtype: torch.dtype,
        *,
        reserved_names: list[str],
        on_gone: Callable[[str], None],
        rehearse: Callable[[AdapterWeights], None] = lambda weights: None,
        head_dtype: torch.dtype | None = None,
    ):
        """`rehearse` raises when the device could not take a new adapter. `head_dtype` is the model's;
        None: the same as the adapters' `dtype`."""
        self._schema = schema
        self._config = config
        self._dtype = dtype
        self._head_dtype = head_dtype or dtype
        self._heads: dict[str, Head] = {}  # by digest
        self._on_gone = on_gone
        self._rehearse = rehearse
        self.host = HostCache[AdapterWeights](config.host_capacity)
        self.registry = Registry(reserved_names, self._gone)
        self.reads = 0
        self._memory = HostMemory()
        self._downloads = Downloads(
            config.max_adapter_download_bytes, config.adapter_fetch_timeout_s
        )
        self._sources: dict[str, AdapterSource] = {}  # by digest
        self._staged: dict[str, _Staged] = {}  # by name
        self.on_load: Callable[[AdapterRef, float], None] | None = None
        # One reader: two would only compete for the same disk and cores.
        self._reader = _threads(1, "adapter-reader")
        # Others check and hash what is new, which takes longer than requests should wait for theirs.
        self.checkers = max(1, min(MOST_CHECKERS, cores() // CORES_A_COPIER))
        self._checker = _threads(self.checkers, "adapter-checker")
        self._rehearsing = threading.Lock()

    def add(self, name: str, path: str, *, replace: bool = False) -> AdapterRef:
        """Serve the adapter in `path`, a folder or another source (see `sources`), under `name`.

        Blocks while it is read; call it outside the step loop. Raises AdapterExists, AdapterNotFound,
        AdapterRejected, or what `rehearse` raises, and then nothing has changed.
        """
        self.stage(name, path, replace=replace)
        return self.publish(name)

    def stage(self, name: str, path: str, *, replace: bool = False) -> AdapterRef:
        """The first half of `add`: read and check, and keep the name until `publish` or `discard`.

        Blocks and raises as `add` does.
        """
        with contextlib.ExitStack() as claim:
            claim.enter_context(self.registry.loading(name, replace=replace))
            start = time.perf_counter()
            fetched = self._downloads.fetch(path)
            weights = self._checker.submit(self._read, name, fetched).result()
            head = self._head_of(weights)
            with self._rehearsing:
                self._rehearse(weights)
            load_s = time.perf_counter() - start
            self._staged[name] = _Staged(weights, head, load_s, claim.pop_all())
        return weights.ref

    def staged(self, name: str) -> AdapterRef | None:
        staged = self._staged.get(name)
        return staged.weights.ref if staged else None

    def publish(self, name: str) -> AdapterRef:
        """The second half of `add`: serve what was staged under this name."""
        staged = self._staged.pop(name)
        with staged.claim:
            self.host.put(staged.weights.ref.digest, staged.weights)
            self._sources[staged.weights.ref.digest] = staged.weights.source
            self._keep(staged)
            ref = self.registry.publish(staged.weights.ref, staged.load_s)
            self._keep(staged)  # an equal version may have gone while this one came
        self._report(ref, staged.load_s)
        return ref

    def discard(self, name: str) -> None:
        """Forget what was staged, if anything was."""
        if (staged := self._staged.pop(name, None)) is not None:
            staged.claim.close()

    def remove(self, name: str) -> AdapterRef:
        """Stop serving `name`; see `Registry.remove`."""
        return self.registry.remove(name)

    def head(self, digest: str) -> Head | None:
        """The classification head of a version that is served or has users, if it has one."""
        return self._heads.get(digest)

    def fetch(self, ref: AdapterRef) -> Future[AdapterWeights]:
        """The weights of exactly this version. The future fails with AdapterLoadFailed when the
        files are gone or have changed since."""
        return self._reader.submit(self._fetch, ref)

    def bring(self, ref: AdapterRef, use: Callable[[Callable[[], AdapterWeights]], None]) -> None:
        """Call `use` in the reader's thread, with what gets the weights or raises AdapterLoadFailed."""
        self._reader.submit(use, partial(self._fetch, ref))

    def status(self, on_device: Callable[[str], bool]) -> list[AdapterStatus]:
        """One entry a served name."""
        rows = []
        for name in self.registry.names():
            if (ref := self.registry.current(name)) is None:
                continue
            rows.append(
                AdapterStatus(
                    ref=ref,
                    users=self.registry.users(ref.digest),
                    on_host=ref.digest in self.host,
                    on_device=on_device(ref.digest),
                    load_s=self.registry.load_s(ref.digest),
                )
            )
        return rows

    def close(self) -> None:
        self._downloads.close()
        for threads in (self._reader, self._checker):
            threads.shutdown(wait=True, cancel_futures=True)

    def _read(self, name: str, fetched: Fetched) -> AdapterWeights:
        self.reads += 1
        weights, _ = read_adapter(
            name, fetched.folder, self._schema, self._config, self._dtype, self._memory
        )
        if fetched.is_remote:
            weights = weights.from_origin(fetched.origin)
        if self._config.verify_adapters:
            refuse_differing(weights, self._schema.aliases)
        return weights

    def _head_of(self, weights: AdapterWeights) -> Head | None:
        head = head_of(weights, self._head_dtype)
        if head is not None and not head.is_finite:
            reason = f"its classification head overflows in the model's {self._head_dtype}"
            raise AdapterRejected(weights.ref.name, [reason])
        return head

    def _keep(self, staged: _Staged) -> None:
        if staged.head is not None:
            self._heads[staged.weights.ref.digest] = staged.head

    def _read_again(self, ref: AdapterRef) -> AdapterWeights | None:
        """The weights without checking them, if the files are those that were checked."""
        source = self._sources.get(ref.digest)
        if source is None or (source.origin or str(source.weights_path.parent)) != ref.source:
            return None
        buffer = source.read_again(self._memory)  # [num_bytes] uint8
        if buffer is None:
            return None
        self.reads += 1
        return AdapterWeights(ref, buffer, source)

    def _fetch(self, ref: AdapterRef) -> AdapterWeights:
        if (cached := self.host.get(ref.digest)) is not None:
            return cached
        start = time.perf_counter()
        weights = self._read_again(ref) or self._read_and_compare(ref)
        self.host.put(ref.digest, weights)
        self._report(ref, time.perf_counter() - start)
        return weights

    def _read_and_compare(self, ref: AdapterRef) -> AdapterWeights:
        try:
            weights = self._read(ref.name, self._downloads.fetch(ref.source))
        except LoramuxError as error:
            raise AdapterLoadFailed(
                f"adapter {ref.name!r} was evicted from host memory and can no longer be read: {error}",
                remedy="restore its files, or raise max_cpu_loras",
            ) from error
        if weights.ref.digest != ref.digest:
            raise AdapterLoadFailed(
                f"the files of adapter {ref.name!r} have changed since it was loaded",
                remedy="load it again with load_inplace to serve the new version",
            )
        self._sources[ref.digest] = weights.source
        return weights

    def _report(self, ref: AdapterRef, seconds: float) -> None:
        logger.info("read adapter %r, digest %s, in %.3f s", ref.name, ref.digest[:12], seconds)
        if self.on_load is not None:
            self.on_load(ref, seconds)

    def _gone(self, digest: str) -> None:
        self.host.drop(digest)
        self._sources.pop(digest, None)
        self._heads.pop(digest, None)
        self._on_gone(digest)
