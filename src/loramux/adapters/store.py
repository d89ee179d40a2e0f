"""Adapters from disk to host memory, in threads of their own: the step loop never waits for a file.

add(name, folder)   read, check, digest -> registry, host cache     (blocks the caller only)
bring(ref, use)     host cache, or read again from the source, then use(weights)   (the reader)

A file that is provably the one that was checked is read again as bytes; any other is checked and
hashed anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from loramux.adapters.downloads import Downloads, Fetched
from loramux.adapters.feed import EventFeed
from loramux.adapters.files import CORES_A_COPIER, cores
from loramux.adapters.header import WEIGHTS_NAME
from loramux.adapters.heads import Head, head_of
from loramux.adapters.host_cache import HostCache, HostMemory
from loramux.adapters.peft import read_adapter
from loramux.adapters.registry import Registry
from loramux.adapters.self_test import refuse_differing
from loramux.adapters.spool import Spool
from loramux.adapters.tokenizers import BaseTokenizer, OwnTokenizer
from loramux.adapters.vocabulary_rows import BaseVocabulary
from loramux.adapters.weights import AdapterSource, AdapterWeights, Vectors
from loramux.config import LoRAConfig
from loramux.errors import AdapterLoadFailed, AdapterRejected, LoramuxError
from loramux.schema import ModelSchema
from loramux.status import AdapterEventKind, AdapterPlace, AdapterStatus
from loramux.types import AdapterRef

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
    tokenizer: OwnTokenizer | None
    load_s: float
    claim: contextlib.ExitStack
    expected: str | None = None
    pinned: bool | None = None


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
        on_pins: Callable[[Mapping[str, AdapterRef]], None] = lambda refs: None,
        rehearse: Callable[[AdapterWeights], Vectors] = lambda weights: {},
        head_dtype: torch.dtype | None = None,
        base: BaseVocabulary | None = None,
        tokenizer: BaseTokenizer | None = None,
    ):
        """`rehearse` raises when the device could not take a new adapter, and gives the gains and shifts
        of its layers. `on_pins` is told, by digest, which versions the device must keep, whenever that
        changes. `head_dtype` is the model's; None: the same as the adapters' `dtype`. `base` has the
        rows that full copies are compared with. `tokenizer` is what adapters' own are compared with;
        None: they are not read."""
        self._base = base
        self._tokenizer = tokenizer if config.lora_tokenizers == "auto" else None
        self._schema = schema
        self._config = config
        self._dtype = dtype
        self._head_dtype = head_dtype or dtype
        self._heads: dict[str, Head] = {}  # by digest
        self._affines: dict[str, Vectors] = {}  # by digest: gains and shifts of those that have any
        self._tokenizers: dict[str, OwnTokenizer] = {}  # by digest, of those that have any
        self._on_gone = on_gone
        self._on_pins = on_pins
        self._rehearse = rehearse
        self.host = HostCache[AdapterWeights](config.host_capacity)
        self.feed = EventFeed()
        self.registry = Registry(
            reserved_names,
            self._gone,
            max_loras=config.max_loras,
            max_names=config.max_registered_adapters,
            on_pins=self._pins_changed,
            feed=self.feed,
        )
        self.spool = Spool()
        self._spooled: dict[str, str] = {}  # digest -> folder
        self.reads = 0
        self._memory = HostMemory()
        self._downloads = Downloads(
            config.max_adapter_download_bytes,
            config.adapter_fetch_timeout_s,
            tokenizers=self._tokenizer is not None,
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

    def add(
        self,
        name: str,
        path: str,
        *,
        replace: bool = False,
        expected: str | None = None,
        pinned: bool | None = None,
    ) -> AdapterRef:
        """Serve the adapter in `path`, a folder or another source (see `sources`), under `name`;
        `expected` and `pinned` as `Registry.publish` has them.

        Blocks while it is read; call it outside the step loop. Raises AdapterExists, AdapterConflict,
        PinRefused, Forbidden, AdapterNotFound, AdapterRejected, or what `rehearse` raises, and then
        nothing has changed.
        """
        self.stage(name, path, replace=replace, expected=expected, pinned=pinned)
        return self.publish(name)

    def stage(
        self,
        name: str,
        path: str,
        *,
        replace: bool = False,
        expected: str | None = None,
        pinned: bool | None = None,
    ) -> AdapterRef:
        """The first half of `add`: read and check, and keep the name until `publish` or `discard`.

        Blocks and raises as `add` does.
        """
        with contextlib.ExitStack() as claim:
            claim.enter_context(
                self.registry.loading(name, replace=replace, expected=expected, pinned=pinned)
            )
            start = time.perf_counter()
            fetched = self._downloads.fetch(path)
            weights = self._checker.submit(self._read, name, fetched).result()
            head, tokenizer = self._head_of(weights), weights.tokenizer
            with self._rehearsing:
                affine = self._rehearse(weights)
            weights = dataclasses.replace(weights, affine=affine, tokenizer=None)
            load_s = time.perf_counter() - start
            staged = _Staged(weights, head, tokenizer, load_s, claim.pop_all(), expected, pinned)
            self._staged[name] = staged
        return weights.ref

    def staged(self, name: str) -> AdapterRef | None:
        staged = self._staged.get(name)
        return staged.weights.ref if staged else None

    def publish(self, name: str) -> AdapterRef:
        """The second half of `add`: serve what was staged under this name. Raises AdapterConflict or
        PinRefused where the name has changed meanwhile."""
        staged = self._staged.pop(name)
        ref, load_s = staged.weights.ref, staged.load_s
        with staged.claim:
            self._install(staged)  # now, since to free what it evicts may take long
            try:
                with self.registry.unchanged():
                    self.registry.publish(
                        ref, load_s, expected=staged.expected, pinned=staged.pinned
                    )
                    self._install(staged)  # an equal version may have gone while this one came
                    self._adopt_folder(ref)
                    self._tell("host-loaded", ref.digest)
            finally:
                self._forget_unless_served(ref.digest)
        self._report(ref, load_s)
        return ref

    def discard(self, name: str) -> None:
        """Forget what was staged, if anything was."""
        if (staged := self._staged.pop(name, None)) is not None:
            staged.claim.close()

    def remove(self, name: str, *, expected: str | None = None) -> AdapterRef:
        """Stop serving `name`; see `Registry.remove`."""
        return self.registry.remove(name, expected=expected)

    def head(self, digest: str) -> Head | None:
        """The classification head of a version that is served or has users, if it has one."""
        return self._heads.get(digest)

    def tokenizer(self, digest: str) -> OwnTokenizer | None:
        """The tokenizer of a version that is served or has users, if it has one of its own."""
        return self._tokenizers.get(digest)

    def fetch(self, ref: AdapterRef) -> Future[AdapterWeights]:
        """The weights of exactly this version. The future fails with AdapterLoadFailed when the
        files are gone or have changed since."""
        return self._reader.submit(self._fetch, ref)

    def bring(self, ref: AdapterRef, use: Callable[[Callable[[], AdapterWeights]], None]) -> None:
        """Call `use` in the reader's thread, with what gets the weights or raises AdapterLoadFailed."""
        self._reader.submit(use, partial(self._fetch, ref))

    def status(
        self, on_device: Callable[[str], bool], *, draining: bool = False
    ) -> list[AdapterStatus]:
        """One entry a served name; with `draining`, also one for each version that drains."""
        rows = self.registry.statuses(self.host.__contains__, on_device)
        return [row for row in rows if draining or row.state == "ready"]

    @property
    def host_bytes(self) -> int:
        """Of all adapters that are kept in host memory."""
        return sum(weights.buffer.numel() for weights in self.host.values())

    def evicted(self, digest: str, place: AdapterPlace) -> None:
        """Tell listeners that a version has left a place."""
        self._tell("evicted", digest, place)

    def on_device(self, digest: str) -> None:
        """Tell listeners that a version has arrived on the device."""
        self._tell("device-loaded", digest)

    def _tell(self, kind: AdapterEventKind, digest: str, place: AdapterPlace | None = None) -> None:
        """Nothing comes of a version that is gone."""
        with self.registry.unchanged():
            if (ref := self.registry.version(digest)) is not None:
                self.feed.tell(kind, ref.name, digest, place=place)

    def close(self) -> None:
        self._downloads.close()
        for threads in (self._reader, self._checker):
            threads.shutdown(wait=True, cancel_futures=True)
        self.spool.close()

    def _read(self, name: str, fetched: Fetched) -> AdapterWeights:
        self._check_size(name, fetched.folder)
        self.reads += 1
        weights, _ = read_adapter(
            *(name, fetched.folder, self._schema, self._config, self._dtype, self._memory),
            *(self._base, self._tokenizer),
        )
        if fetched.is_remote:
            weights = weights.from_origin(fetched.origin)
        if self._config.verify_adapters:
            refuse_differing(weights, self._schema.aliases)
        return weights

    def _check_size(self, name: str, folder: str | Path) -> None:
        most = self._config.max_adapter_bytes
        try:
            size = (Path(folder).expanduser() / WEIGHTS_NAME).stat().st_size
        except OSError:
            return  # the reader says what is wrong
        if most is not None and size > most:
            reason = f"{WEIGHTS_NAME} has {size} bytes, and at most {most} are allowed"
            raise AdapterRejected(name, [reason], remedy="start with a larger --max-adapter-bytes")

    def _head_of(self, weights: AdapterWeights) -> Head | None:
        head = head_of(weights, self._head_dtype)
        if head is not None and not head.is_finite:
            reason = f"its classification head overflows in the model's {self._head_dtype}"
            raise AdapterRejected(weights.ref.name, [reason])
        return head

    def _install(self, staged: _Staged) -> None:
        digest = staged.weights.ref.digest
        self._keep_on_host(digest, staged.weights)
        self._sources[digest] = staged.weights.source
        if staged.head is not None:
            self._heads[digest] = staged.head
        if staged.weights.affine:
            self._affines[digest] = staged.weights.affine
        if staged.tokenizer is not None:
            self._tokenizers[digest] = staged.tokenizer

    def _keep_on_host(self, digest: str, weights: AdapterWeights) -> None:
        for other in self.host.put(digest, weights):
            self.evicted(other, "host")

    def _forget_unless_served(self, digest: str) -> None:
        """What was kept for a version that has gone meanwhile, or never came, would stay for ever."""
        with self.registry.unchanged():
            if self.registry.version(digest) is None:
                self._forget(digest)

    def _forget(self, digest: str) -> None:
        self.host.drop(digest)
        for kept in (self._sources, self._heads, self._affines, self._tokenizers):
            kept.pop(digest, None)

    def _adopt_folder(self, ref: AdapterRef) -> None:
        """A folder of ours goes with its version, or when the same version comes from another one."""
        before = self._spooled.pop(ref.digest, None)
        if self.spool.owns(ref.source):
            self._spooled[ref.digest] = ref.source
        if before is not None and before != ref.source:
            self._drop_folder(before)

    def _drop_folder(self, folder: str) -> None:
        with contextlib.suppress(RuntimeError):  # closed: all of them go
            self._reader.submit(self.spool.drop, folder)  # large files take their time

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
        ref = self.registry.version(ref.digest) or ref  # its newest source
        affine = self._affines.get(ref.digest, {})
        weights = self._read_again(ref) or self._read_and_compare(ref)
        weights = dataclasses.replace(weights, affine=affine, tokenizer=None)
        self._keep_on_host(ref.digest, weights)
        self._tell("host-loaded", ref.digest)
        self._forget_unless_served(ref.digest)
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
        self._forget(digest)
        if (folder := self._spooled.pop(digest, None)) is not None:
            self._drop_folder(folder)
        self._on_gone(digest)

    def _pins_changed(self, refs: Mapping[str, AdapterRef], granted: frozenset[str]) -> None:
        """Under the registry's lock."""
        self.host.pinned = frozenset(refs)
        for ref in refs.values():
            if ref.digest not in self.host:
                with contextlib.suppress(RuntimeError):  # closed
                    self.fetch(ref)
        self._on_pins({digest: refs[digest] for digest in granted})
