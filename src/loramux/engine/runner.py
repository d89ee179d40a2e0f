"""The only door to the device: a frozen plan in, chosen tokens out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from loramux.adapters.shards import cut_adapter, dealt_rows
from loramux.adapters.weights import AdapterWeights, StoredExperts, Vectors
from loramux.config import EngineConfig, ModelFacts, num_blocks, plan_memory
from loramux.config.memory import place_rows, pool_rows
from loramux.config.memory_advice import Part, out_of_memory
from loramux.engine.affine import Affines
from loramux.engine.encoder_step import EncoderStep, StepMedia
from loramux.engine.plan import AdapterLoad, Row, StepPlan, StepResult
from loramux.engine.reading import Reading
from loramux.engine.vocabulary import Vocabularies
from loramux.errors import ConfigError
from loramux.kernels import LoRASite
from loramux.layers.batch import VocabularyStep
from loramux.layers.dealt import dealt_sites
from loramux.layers.experts import own_sites
from loramux.layers.linear import MergedLinear
from loramux.layers.sharded import ShardedLinear
from loramux.models.attach import Attached
from loramux.models.device_memory import refused_when_full

if TYPE_CHECKING:  # it needs Triton, which a CPU does not
    from loramux.engine.device_loader import DeviceLoader


class Running(Protocol):
    """A step that was launched."""

    def read(self) -> StepResult:
        """What it chose; waits for this step and no other. Raises what went wrong on the device."""
        ...


@dataclass(frozen=True, slots=True)
class Finished:
    """A step that was done when `launch` returned."""

    result: StepResult

    def read(self) -> StepResult:
        return self.result


class Runner(ABC):
    """Holds the model, the KV cache and the adapter pool; executes steps and loads adapters.

    `launch` belongs to the step loop's thread. `load` may run in another thread at the same time:
    it writes only rows that no step uses until the scheduler has been told.
    """

    def __init__(self, attached: Attached, config: EngineConfig, facts: ModelFacts):
        self.attached = attached
        self.decoder = attached.decoder
        self.num_blocks = num_blocks(config, facts)
        self.block_size = config.block_size
        self.run_ahead = bool(config.async_scheduling)
        self.group = attached.group
        self._deal = config.row_granule
        self._affine_rows: set[int] = set()  # first pool rows of adapters with gains and shifts
        self._affines: Affines | None = None
        self._device = attached.device
        self._sees_whole = facts.encoder is not None and facts.encoder.sees_whole
        dtype = getattr(torch, facts.dtype)
        self._plan = plan_memory(config, facts)
        self._taking = partial(_taking, config, facts)
        with self._taking("pool", self._plan.needs.pool):
            self._attach_pool(config, dtype)
            linear = [merged.site for merged in attached.sites if merged.site is not None]
            self._sites = [*linear, *own_sites(attached.experts)]
            self._loader = self._make_loader(self._sites)
            self._dealt_sites = dealt_sites(attached.sites, attached.experts, self._deal)
            self._dealt_loader = self._make_loader(self._dealt_sites)
            self._vocabularies = Vocabularies.of(attached, config)
        with self._taking("kv_cache", self._plan.kv_bytes):
            for attention in attached.attentions:
                attention.allocate(self.num_blocks, config.block_size, dtype, facts.device)

    def _attach_pool(self, config: EngineConfig, dtype: torch.dtype) -> None:
        if config.lora is not None:
            rows = pool_rows(config.lora, config.row_granule)
            lora_dtype = getattr(torch, config.lora.lora_dtype)
            shared = self._place_rows = place_rows(config.lora, config.row_granule)
            self._affines = Affines(self.attached, lora_dtype, self.group.beside)
            under = self.extends_products and lora_dtype == dtype
            for site in self.attached.sites:
                site.attach_site(rows, lora_dtype, under_weight=under, place_rows=shared)
            for experts in self.attached.experts:
                experts.attach_sites(rows, lora_dtype)

    reading: Reading[torch.cuda.Event] | None = None  # where steps run behind the host
    extends_products = False  # whether A stands under the base weights

    @abstractmethod
    def launch(self, plan: StepPlan) -> Running:
        """Start one step. Raises what can be told at once.

        A `PENDING` token is what its sequence chose in the step launched before this one."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. Keys and values of its tokens are in the cache when it returns."""
        return self.launch(plan).read()

    def _make_encoder(self, ranks: Mapping[int, int]) -> EncoderStep | None:
        """`ranks`: first pool row -> rank rows of the adapter there, as it changes."""
        towers = self.attached.towers
        whole = self._sees_whole
        return (
            None
            if towers is None
            else EncoderStep(towers, ranks, self._affine_rows, sees_whole=whole)
        )

    def _place(self, media: StepMedia) -> torch.Tensor | None:
        """Where the step's tokens stand, if media count positions in three dimensions: [T] for the fused
        decoder, whose angles are made ready, else [3, T]. On the host."""
        if media.positions is None:
            return None
        three = torch.from_numpy(media.positions)  # [3, T]
        if self.decoder is None:
            return three
        one = three[0].clone()  # [T]
        odd = (three != three[0]).any(0).nonzero().squeeze(1)  # [K]
        if len(odd):
            first = self.decoder.set_positions(three[:, odd].to(self._device))
            one[odd] = first + torch.arange(len(odd))  # [K]
        return one

    @torch.inference_mode()
    def load(self, load: AdapterLoad, weights: AdapterWeights) -> None:
        """Write an adapter into its rank rows; they hold it when this returns.

        Raises AdapterLoadFailed when the device has no memory for it.
        """
        assert bool(weights.affine) == load.ref.affine, (
            "gains and shifts are missing. This is a bug."
        )
        own, dealt = self._parts(weights)
        reading, rows = self.reading, self._rows_of(load)
        if load.ref.affine:
            rows += -rows % self._place_rows  # it has whole places
            self._affine_rows.add(load.first_row)
        else:
            self._affine_rows.discard(load.first_row)
        after = None if reading is None else reading.until(load.first_row, rows)
        self._write(self._loader, self._sites, load, own, after)
        if dealt is not None:
            place = AdapterLoad(dealt.ref, load.first_row // self._deal)
            self._write(self._dealt_loader, self._dealt_sites, place, dealt, after)
        self._load_vocabulary(load, weights, after)

    def close(self) -> None:  # noqa: B027
        """Give up what would keep the ranks from parting; nothing is launched afterwards."""

    def _rows_of(self, load: AdapterLoad) -> int:
        """Rank rows of the pool that an adapter takes."""
        return load.ref.max_r + -load.ref.max_r % self._deal

    @torch.inference_mode()
    def rehearse(self, weights: AdapterWeights) -> Vectors:
        """All of a load that can fail, but the writing, before an adapter is served at all. Returns its
        gains and shifts, which `load` wants with the weights.

        Raises AdapterLoadFailed as `load` does."""
        assert self._affines is not None, "an adapter without a pool. This is a bug."
        affine = self._affines.of(weights)  # first: the ranks meet there
        own, dealt = self._parts(weights)
        for loader, part in ((self._loader, own), (self._dealt_loader, dealt)):
            if loader is not None and part is not None:
                loader.rehearse(part)
        return affine

    def _parts(self, weights: AdapterWeights) -> tuple[AdapterWeights, AdapterWeights | None]:
        """What this rank holds of an adapter; and, where they are dealt out, of the rows of A."""
        if self.group.size == 1:
            return weights, None
        cuts = self.attached.shards.cuts
        dealt = dealt_rows(weights, cuts, self.group.rank) if self._deal > 1 else None
        return cut_adapter(weights, cuts), dealt

    def _write(
        self,
        loader: DeviceLoader | None,
        sites: Sequence[LoRASite],
        load: AdapterLoad,
        weights: AdapterWeights,
        after: torch.cuda.Event | None,
    ) -> None:
        affine = list(self._affine_places(load, weights))
        if loader is not None:
            loader.load(load, weights, after=after, affine=affine)
            return
        for place, vectors in affine:
            place.copy_(vectors)
        rows = slice(load.first_row, load.first_row + weights.ref.max_r)
        first = load.first_row
        for site in sites:
            site.row_r.view(site.num_slices, site.experts, -1)[:, :, rows] = 0
        for name, pair in weights.pairs.items():
            spec = self.attached.schema.modules[name]
            site, index = sites[spec.site], spec.slice_index
            columns = slice(site.slice_starts[index], site.slice_starts[index + 1])
            site.a[index, first : first + pair.r].copy_(pair.a)  # [r, in]
            site.b[first : first + pair.r, columns].copy_(pair.b)  # [r, out]
            site.row_scale[index, first] = pair.scale
            site.row_r[index, first] = pair.r
        for name, stored in weights.layout.experts.items():
            spec = self.attached.schema.modules[name]
            _write_experts(sites[spec.site], spec.slice_index, stored, weights.buffer, first)

    def _affine_places(
        self, load: AdapterLoad, weights: AdapterWeights
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Where in the pool the gains and shifts of an adapter belong, and what: [2, N] each."""
        if not weights.affine:
            return
        modules = self.attached.schema.modules
        by_site: dict[int, list[str]] = {}
        for name in weights.affine:
            by_site.setdefault(modules[name].site, []).append(name)
        place = load.first_row // self._place_rows
        for site, merged in enumerate(self.attached.sites):
            assert merged.affine is not None
            vectors = torch.zeros(2, merged.out_features, dtype=merged.affine.dtype)  # [2, N]
            for name in by_site.get(site, ()):
                index = modules[name].slice_index
                vectors[:, merged.starts[index] : merged.starts[index + 1]] = weights.affine[name]
            if not self._shifts(merged):
                vectors[1] = 0
            yield merged.affine[:, place], vectors

    def _shifts(self, merged: MergedLinear) -> bool:
        """Whether this rank shifts the layer's outputs. Packed weights take deltas into the partial sums
        of a row layer, and of a sum a shift counts once."""
        partial = isinstance(merged, ShardedLinear) and merged.kind == "row" and self._deal == 1
        return not (partial and merged.is_packed) or self.group.rank == 0

    def _vocabulary_step(self, rows: Sequence[Row]) -> VocabularyStep | None:
        """What of `rows` changes the vocabulary; None: nothing."""
        return None if self._vocabularies is None else self._vocabularies.step(rows)

    def _masked(self, logits: torch.Tensor) -> torch.Tensor:
        """The step's logits [B, V] without tokens that a row's vocabulary does not have."""
        step = self.attached.batch.vocabulary
        if step is not None and self._vocabularies is not None:
            self._vocabularies.pool.mask(logits, step)
        return logits

    def _load_vocabulary(
        self, load: AdapterLoad, weights: AdapterWeights, after: torch.cuda.Event | None
    ) -> None:
        """Every rank has it whole."""
        if self._vocabularies is None:
            return
        self._vocabularies.forget(load.first_row)
        if weights.layout.vocabulary is None:
            return
        write = partial(self._vocabularies.write, load, weights)
        if self._loader is None:
            write()
        else:
            self._loader.write(load.ref.name, write, after)

    def _make_loader(self, sites: Sequence[LoRASite]) -> DeviceLoader | None:
        """What brings adapters to a GPU beside the steps; None on a CPU, or without adapters."""
        if self._device.type != "cuda" or not sites:
            return None
        from loramux.engine.device_loader import DeviceLoader

        return DeviceLoader(self._device, sites, self.attached.schema)


def _write_experts(
    site: LoRASite, index: int, stored: StoredExperts, buffer: torch.Tensor, first: int
) -> None:
    """One projection of all experts, into slice `index` from rank row `first` of each on."""
    columns = slice(site.slice_starts[index], site.slice_starts[index + 1])
    rows = site.row_r.shape[1] // site.experts
    for expert, a, b, scale in stored.views(buffer):
        start = expert * rows + first
        site.a[index, start : start + len(a)].copy_(a)  # [r, in]
        site.b[start : start + len(a), columns].copy_(b.t())  # [r, out]
        site.row_scale[index, start] = scale
        site.row_r[index, start] = len(a)


def _taking(
    config: EngineConfig, facts: ModelFacts, part: Part, need: int
) -> AbstractContextManager[None]:
    """Where `part` of the memory is taken, about `need` bytes: running out becomes a ConfigError that
    says which budget to lower."""

    def refusal(free: int) -> ConfigError:
        return out_of_memory(part, need, free, config, facts)

    return refused_when_full(facts.device, refusal)
