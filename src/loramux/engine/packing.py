"""A step's numbers in one int32 buffer, so that one copy brings them to the device.

The buffer has the same fields at the same offsets on the host (pinned, two of them: one may still be
on its way while the next step is written) and on the device, where captured graphs read them.

    ids sources positions slots | keep | chunks counts members | sequences | pages
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from loramux.config import EngineConfig
from loramux.config.graphs import LARGEST, REREAD_POSITIONS
from loramux.engine.plan import PENDING, Members, Row
from loramux.kernels import AFFINE, WorkList

Array = np.ndarray
CHUNK_WORDS = 8  # of a chunk's record, see `WorkList`
# Rows that a LoRA program takes together: B is read once. Steps of up to so many tokens: that many.
CHUNKS = ((64, 8), (LARGEST, 16))
FEWEST_DECODES = 4  # in a mixed step: fewer are not worth kernels of their own
MEMBERS_A_ROW = 4  # room for adapters in the buffer of a captured step, copied whole
LARGE_CHUNK = 64  # of larger steps, which no graph captures


@dataclass(frozen=True, slots=True)
class Capacity:
    """The largest step a buffer holds."""

    tokens: int
    sequences: int
    members: int  # of all parts of rows: a row in which an adapter begins has the others twice
    pages: int  # blocks of all sequences together
    ranks: int = 0  # rank rows of a member, see `WorkList.max_ranks`

    def fields(self) -> dict[str, int]:
        """Name -> length, in the order in which they stand; the longest last, seldom copied whole."""
        chunks = self.tokens  # the worst case: every token has adapters of its own
        return {
            "ids": self.tokens,
            "sources": self.tokens,
            "positions": self.tokens,
            "slots": self.tokens,
            "keep": self.sequences,
            "chunks": CHUNK_WORDS * chunks,
            "counts": 2,
            "member_rows": self.members,
            "member_columns": self.members,
            "member_scales": self.members,  # the bits of a float32
            "member_ranks": self.members,
            "query_starts": self.sequences + 1,
            "prefill_starts": self.sequences + 1,
            "context_lens": self.sequences,
            "page_starts": self.sequences + 1,
            "last_page_lens": self.sequences,
            "pages": self.pages,
        }


def capacities(
    config: EngineConfig, largest: int, block_size: int
) -> tuple[int, Capacity, Capacity]:
    """(blocks of the longest sequence, captured steps of up to `largest` tokens, all steps)."""
    assert config.max_model_len is not None and config.max_num_batched_tokens is not None
    blocks = -(-config.max_model_len // block_size) + 1
    sequences = config.max_num_seqs
    pages = sequences * (blocks + 1)
    members = sequences * (config.lora.max_loras if config.lora else 1)
    # Compositions are mostly short; a step with more members in all runs without a graph.
    few = min(members, MEMBERS_A_ROW * largest)
    room = pages + largest + REREAD_POSITIONS // block_size
    tokens = max(config.max_num_batched_tokens, sequences)
    ranks = config.lora.max_lora_rank if config.lora else 0
    return (
        blocks,
        Capacity(largest, largest, few, room, ranks),
        Capacity(tokens, sequences, 2 * members, pages, ranks),
    )


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring tokens of one composition."""

    start: int
    end: int
    members: Members


@dataclass(frozen=True, slots=True)
class StepShape:
    """What the host knows of a packed step."""

    tokens: int
    sequences: int
    kept: int
    max_queries: int
    active: int  # compositions with adapters
    chunks: int
    words: int  # of the buffer, from its start, that have to be copied


class PackedStep:
    """One buffer on the device, two on the host, and the views of their fields."""

    def __init__(self, capacity: Capacity, device: torch.device):
        self.capacity = capacity
        lengths = capacity.fields()
        self.offsets = dict(zip(lengths, _offsets(list(lengths.values())), strict=False))
        total = _offsets(list(lengths.values()))[-1]
        self.device = torch.zeros(total, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self.hosts = [torch.zeros(total, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self._lengths = lengths
        self._turn = 0
        self._copied = [torch.cuda.Event() for _ in self.hosts] if pinned else []

    def next_host(self) -> torch.Tensor:
        """The host buffer whose turn it is."""
        self._turn = 1 - self._turn
        if self._copied:
            # Its last copy was queued two steps ago, so in practice this does not wait.
            self._copied[self._turn].synchronize()
        return self.hosts[self._turn]

    def send(self, host: torch.Tensor, words: int) -> None:
        """Queue the copy of the first `words` words to the device."""
        self.device[:words].copy_(host[:words], non_blocking=True)
        if self._copied:
            self._copied[self._turn].record()

    def view(self, buffer: torch.Tensor, name: str) -> torch.Tensor:
        """Field `name` of a buffer, int32; `member_scales` as float32."""
        start = self.offsets[name]
        field = buffer[start : start + self._lengths[name]]
        return field.view(torch.float32) if name == "member_scales" else field

    def work(
        self, chunks: int, rows_per_chunk: int, members: int | None = None, *, affine: bool
    ) -> WorkList:
        """The adapters of the step on the device, of at most so many chunks and members; `affine`: some
        may have gains and shifts."""
        view, buffer = self.view, self.device
        return WorkList(
            chunks=view(buffer, "chunks")[: CHUNK_WORDS * chunks].view(chunks, CHUNK_WORDS),
            counts=view(buffer, "counts"),
            member_rows=view(buffer, "member_rows")[:members],
            member_columns=view(buffer, "member_columns")[:members],
            member_scales=view(buffer, "member_scales")[:members],
            member_ranks=view(buffer, "member_ranks")[:members],
            rows_per_chunk=rows_per_chunk,
            max_chunks=chunks,
            affine=affine,
            max_ranks=self.capacity.ranks,
        )

    def arrays(self, host: torch.Tensor) -> dict[str, Array]:
        return {name: self.view(host, name).numpy() for name in self._lengths}

    def fits(self, rows: Sequence[Row]) -> bool:
        """Whether a step of `rows` has room."""
        tokens = sum(len(row.token_ids) for row in rows)
        pages = sum(len(row.block_table) for row in rows)
        members = sum(len(run.members) for run in runs_of(rows))
        room = self.capacity
        # One page more for each padding row.
        return (
            tokens <= room.tokens
            and len(rows) <= room.sequences
            and pages + room.sequences <= room.pages
            and members <= room.members
        )


def _offsets(lengths: list[int]) -> list[int]:
    """Start of each field, 16 bytes apart at least, and the end of the last."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + -(-length // 4) * 4)
    return starts


def chunk_rows(tokens: int) -> int:
    """Rows of the chunks of a step of so many tokens."""
    return next((rows for most, rows in CHUNKS if tokens <= most), LARGE_CHUNK)


def decodes_first(rows: Sequence[Row]) -> Sequence[Row]:
    """Rows of one token before longer ones, where both are there; else as they are.

    Attention takes them with different kernels. Compositions then stand in two places each."""
    if sum(len(row.token_ids) == 1 for row in rows) < FEWEST_DECODES:
        return rows
    return sorted(rows, key=lambda row: len(row.token_ids) > 1)


def leading_decodes(rows: Sequence[Row]) -> int:
    """How many rows at the start are decoded by kernels of their own."""
    count = next((i for i, row in enumerate(rows) if len(row.token_ids) > 1), len(rows))
    return count if count >= FEWEST_DECODES else 0


def have_members(runs: Sequence[Run], rows: Set[int]) -> bool:
    """Whether any adapter of `runs` is in one of these pool rows."""
    return bool(rows) and any(row in rows for run in runs for row, _ in run.members)


def runs_of(rows: Sequence[Row]) -> list[Run]:
    """Rows, or parts of rows, with equal members, joined where they are neighbours."""
    runs: list[Run] = []
    start, token, current = 0, 0, None
    for row in rows:
        if row.before is None:
            parts: Sequence[tuple[int, Members]] = ((len(row.token_ids), row.members),)
        else:
            parts = row.parts()
        for count, members in parts:
            if members != current:
                if current is not None:
                    runs.append(Run(start, token, current))
                start, current = token, members
            token += count
    if current is not None:
        runs.append(Run(start, token, current))
    return runs


def active_runs(runs: Sequence[Run]) -> int:
    """Compositions that a captured step must have room for beside one run of the base model, whose
    tokens stand in several places where adapters begin within rows."""
    return max(sum(1 for run in runs if run.members), len(runs) - 1)


def fill(
    packed: PackedStep,
    host: torch.Tensor,
    rows: Sequence[Row],
    block_size: int,
    *,
    previous: Mapping[int, int],
    columns: Mapping[Members, Sequence[int]],
    ranks: Mapping[int, int],
    affine_rows: Set[int] = frozenset(),
    rows_per_chunk: int,
    pad_to: int = 0,
    decodes: int = 0,
) -> StepShape:
    """Write a step into `host`.

    `previous` says where in the step before a sequence's token was chosen, `columns` where in `h`
    the members of a composition stand, `ranks` how many rank rows the adapter of a pool row has,
    `affine_rows` the pool rows of adapters that have gains and shifts.
    Rows up to `pad_to` are filled with tokens that write nothing and attend to one position of
    block 0. `prefill_starts` counts from behind the first `decodes` rows, of one token each.
    """
    arrays = packed.arrays(host)
    tokens = _fill_tokens(arrays, rows, block_size, previous)
    kept, longest = _fill_sequences(arrays, rows, block_size)
    rest = arrays["query_starts"][decodes : len(rows) + 1]
    arrays["prefill_starts"][: len(rest)] = rest - decodes
    runs = runs_of(rows)
    chunks = _fill_chunks(arrays, runs, columns, ranks, affine_rows, rows_per_chunk)
    # A captured graph looks at as many as it has rows.
    arrays["chunks"][CHUNK_WORDS * chunks : CHUNK_WORDS * pad_to] = 0
    pages = int(arrays["page_starts"][len(rows)])
    count = len(rows)
    if pad_to > count:
        arrays["keep"][kept:count] = 0  # a graph that keeps fewer rows than tokens looks at these
        _pad(arrays, tokens, count, pages, pad_to)
        pages += pad_to - count
        tokens, count, kept = pad_to, pad_to, pad_to
    return StepShape(
        tokens=tokens,
        sequences=count,
        kept=kept,
        max_queries=longest,
        active=sum(1 for run in runs if run.members),
        chunks=chunks,
        words=packed.offsets["pages"] + pages,
    )


def _fill_tokens(
    arrays: dict[str, Array], rows: Sequence[Row], block_size: int, previous: Mapping[int, int]
) -> int:
    """ids, sources, positions and slots of every token; how many there are."""
    token = 0
    ids, sources = arrays["ids"], arrays["sources"]
    positions, slots = arrays["positions"], arrays["slots"]
    for row in rows:
        count, start = len(row.token_ids), row.start
        end = token + count
        if count == 1:
            ids[token] = row.token_ids[0]
            positions[token] = start + row.shift
            slots[token] = row.block_table[start // block_size] * block_size + start % block_size
        else:
            ids[token:end] = row.token_ids
            places = np.arange(start, start + count)
            table = np.asarray(row.block_table)
            positions[token:end] = places + row.shift
            slots[token:end] = table[places // block_size] * block_size + places % block_size
        sources[token:end] = -1
        if row.token_ids[-1] == PENDING:
            ids[end - 1] = 0
            sources[end - 1] = previous[row.sequence_id]
        token = end
    return token


def _fill_sequences(
    arrays: dict[str, Array], rows: Sequence[Row], block_size: int
) -> tuple[int, int]:
    """Query rows, contexts and pages of every sequence; (rows kept for logits, longest query)."""
    counts = np.fromiter((len(row.token_ids) for row in rows), np.int32, len(rows))
    starts = np.fromiter((row.start for row in rows), np.int32, len(rows))
    contexts = starts + counts
    pages = -(-contexts // block_size)
    arrays["query_starts"][0] = arrays["page_starts"][0] = 0
    np.cumsum(counts, out=arrays["query_starts"][1 : len(rows) + 1])
    np.cumsum(pages, out=arrays["page_starts"][1 : len(rows) + 1])
    arrays["context_lens"][: len(rows)] = contexts
    arrays["last_page_lens"][: len(rows)] = (contexts - 1) % block_size + 1
    total = int(pages.sum())
    tables = (
        row.block_table if len(row.block_table) == used else row.block_table[:used]
        for row, used in zip(rows, pages.tolist(), strict=True)
    )
    arrays["pages"][:total] = np.fromiter(chain.from_iterable(tables), np.int32, total)
    sampling = [i for i, row in enumerate(rows) if row.sample is not None]
    arrays["keep"][: len(sampling)] = arrays["query_starts"][1 : len(rows) + 1][sampling] - 1
    return len(sampling), int(counts.max(initial=0))


def _fill_chunks(
    arrays: dict[str, Array],
    runs: list[Run],
    columns: Mapping[Members, Sequence[int]],
    ranks: Mapping[int, int],
    affine_rows: Set[int],
    rows_per_chunk: int,
) -> int:
    """The work list, see `WorkList`; how many chunks it has. Runs of the base model come first."""
    members: list[tuple[int, int, float, int]] = []
    chunks: list[tuple[int, ...]] = []
    firsts: list[int] = []  # of the chunks with members, their first one
    plain = 0
    for run in sorted(runs, key=lambda run: bool(run.members)):
        cuts = range(run.start, run.end, rows_per_chunk)
        first = len(members)
        for (row, scale), column in zip(run.members, columns.get(run.members, ()), strict=True):
            flag = AFFINE if row in affine_rows else 0
            members.append((row, column, scale, ranks[row] + flag))
        stop = len(members)
        chunks += [(cut, min(cut + rows_per_chunk, run.end), first, stop) for cut in cuts]
        if run.members:
            firsts += [first] * len(cuts)
        else:
            plain += len(cuts)
    table = arrays["chunks"][: CHUNK_WORDS * len(chunks)].reshape(-1, CHUNK_WORDS)
    table[:, :4] = chunks or np.empty((0, 4))
    table[:plain, 4:] = 0
    if members:
        lists = _fill_members(arrays, members)
        table[plain:, 4:] = lists[firsts]
    arrays["counts"][:] = (plain, len(chunks))
    return len(chunks)


def _fill_members(arrays: dict[str, Array], members: list[tuple[int, int, float, int]]) -> Array:
    """The lists of the members; and as words [M, 4]: row, column, bits of the scale, rank."""
    rows, columns, scales, ranks = zip(*members, strict=True)
    lists = np.empty((len(members), 4), np.int32)
    lists[:, 0], lists[:, 1], lists[:, 3] = rows, columns, ranks
    lists[:, 2] = np.asarray(scales, np.float32).view(np.int32)
    count = len(members)
    arrays["member_rows"][:count] = lists[:, 0]
    arrays["member_columns"][:count] = lists[:, 1]
    arrays["member_scales"][:count] = scales
    arrays["member_ranks"][:count] = lists[:, 3]
    return lists


def _pad(arrays: dict[str, Array], tokens: int, count: int, pages: int, pad_to: int) -> None:
    """Rows that fill a captured graph up: they write nothing, and nobody reads what they compute."""
    arrays["ids"][tokens:pad_to] = 0
    arrays["positions"][tokens:pad_to] = 0
    arrays["sources"][tokens:pad_to] = -1
    arrays["slots"][tokens:pad_to] = -1
    arrays["keep"][count:pad_to] = np.arange(count, pad_to)
    extra = np.arange(1, pad_to - count + 1)
    arrays["query_starts"][count + 1 : pad_to + 1] = tokens + extra
    arrays["page_starts"][count + 1 : pad_to + 1] = pages + extra
    arrays["context_lens"][count:pad_to] = 1
    arrays["last_page_lens"][count:pad_to] = 1
    arrays["pages"][pages : pages + pad_to - count] = 0
