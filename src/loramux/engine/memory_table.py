"""The memory plan as people read it: a table at start, a line in the log."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from loramux.config import MemoryPlan
from loramux.config.sizes import format_size


def show(plan: MemoryPlan, console: Console | None = None) -> None:
    """Print the table, on stderr where no console is given."""
    (console or Console(stderr=True)).print(memory_table(plan))


def memory_table(plan: MemoryPlan) -> Table:
    """One row a part."""
    each = f", for each of {plan.num_ranks} ranks" if plan.num_ranks > 1 else ""
    table = Table(title=f"Memory of {plan.device}{each}", title_justify="left")
    table.add_column("part")
    table.add_column("size", justify="right")
    table.add_column("what it holds")
    for part, num_bytes, text in _rows(plan):
        table.add_row(part, format_size(num_bytes), text)
    return table


def summary(plan: MemoryPlan) -> str:
    """The same in one line."""
    return "; ".join(
        f"{part} {format_size(num_bytes)}" + (f" ({text})" if text else "")
        for part, num_bytes, text in _rows(plan)
    )


def _rows(plan: MemoryPlan) -> list[tuple[str, int, str]]:
    needs = plan.needs
    kv = (
        f"{plan.num_blocks:,} blocks of {plan.block_size} tokens: {plan.num_tokens:,} tokens, "
        f"{plan.full_sequences:,.1f} sequences of {plan.max_model_len:,}"
    )
    pool = "no adapters are served"
    if plan.max_loras:
        rows = plan.max_loras * plan.max_lora_rank
        pool = f"{plan.max_loras:,} adapters of rank {plan.max_lora_rank}: {rows:,} rows"
    if plan.vocabulary_bytes:
        pool += f"; {format_size(plan.vocabulary_bytes)} of it for their vocabularies"
    rows_found = [
        ("weights", plan.weight_bytes, ""),
        ("adapter pool", needs.pool, pool),
        ("KV cache", plan.kv_bytes, kv),
        (
            "graphs",
            needs.graphs,
            f"{plan.num_graphs} captured steps" if plan.num_graphs else "none",
        ),
        ("activations", needs.activations, "the largest step, estimated"),
    ]
    if needs.encoder:
        rows_found.append(
            ("encoder", needs.encoder, "vectors of media, and making them, estimated")
        )
    left = max(0, plan.left_bytes)
    if plan.total_bytes:
        share = f"gpu_memory_utilization {plan.utilization:g} of {format_size(plan.total_bytes)}"
        rows_found.append(
            ("workspace", needs.workspace, "attention, products, packed steps, loads")
        )
        rows_found.append(("left free", left, share))
    else:
        rows_found.append(("left free", left, ""))
    return rows_found
