"""What `kivi memory` prints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from modules.cli.memory.figures import Plan, model_config, shape_of, weight_bytes
from modules.cli.memory.flags import Memory
from modules.cli.memory.plot import FORMATS, write_plot
from modules.cli.sizes import parse_bytes
from modules.cli.status import UserError
from modules.options import MOST_TOKENS


def run(command: Memory) -> None:
    """Print the figures, as tables or as JSON, and draw them where asked for."""
    result = figures(command)
    if command.plot:
        write_plot(result, command.plot)
    if command.json:
        print(json.dumps(result, indent=2))
        return
    console = Console()
    console.print(bytes_table(result))
    if "gpu" in result:
        console.print(fit_table(result))
    if command.plot:
        console.print(f"written: {command.plot}", highlight=False)


def figures(command: Memory) -> dict[str, Any]:
    """Everything that is printed, as plain values.

    Raises:
        UserError, ValueError: for a model that is not there, or options or a plot's name that do not fit.
    """
    if command.plot and Path(command.plot).suffix not in FORMATS:
        raise UserError(f"--plot must end in {', '.join(FORMATS)}; got {command.plot}.")
    config = model_config(command.model)
    dtype = getattr(torch, command.dtype)
    plan = Plan(config, dtype, command.chunk, command.reserve)
    result: dict[str, Any] = {
        "model": command.model,
        "shape": shape_of(config),
        "dtype": command.dtype,
        "options": dataclasses.asdict(command.cache),
        "rows": [
            plan.row(options, tokens, command.batch) for options in command.contenders for tokens in command.lengths
        ],
    }
    if command.budget is not None:
        result["gpu"] = _gpu(command, plan, command.budget)
    return result


def _gpu(command: Memory, plan: Plan, budget: int) -> dict[str, Any]:
    """What fits beside the weights."""
    weights = parse_bytes(command.weights, "--weights") if command.weights else weight_bytes(plan.config, plan.dtype)
    room = budget - weights
    if room <= 0:
        raise UserError(
            f"the weights take {decimal(weights)} and --gpu-memory {command.gpu_memory} less --overhead "
            f"{command.overhead} is {decimal(max(0, budget))}; nothing is left for a cache. Give more --gpu-memory, or "
            "the size of quantized --weights."
        )
    lengths, batch = command.lengths, command.batch
    fits = [
        {"k_bits": options.k_bits, "v_bits": options.v_bits} | plan.fit(options, room, lengths, batch)
        for options in command.contenders
    ]
    float16 = plan.fit(None, room, lengths, batch)
    return {
        "memory": command.gpu_memory,
        "weights_bytes": weights,
        "room_bytes": room,
        "fits": fits,
        "float16": float16,
    }


def _bits(entry: dict[str, Any]) -> str:
    """Bits of keys and values; a side with an entry a layer by their mean."""
    sides = [entry["k_bits"], entry["v_bits"]]
    return ", ".join(f"{sum(side) / len(side):.3g}" if isinstance(side, (list, tuple)) else str(side) for side in sides)


def bytes_table(result: dict[str, Any]) -> Table:
    """A row a length and pair of bits."""
    shape, options, rows = result["shape"], result["options"], result["rows"]
    sequences = "one sequence" if rows[0]["batch"] == 1 else f"{rows[0]['batch']} sequences"
    table = Table(
        title=f"{result['model']}: {shape['layers']} layers, {shape['kv_heads']} KV heads of {shape['head_dim']}; {sequences}",
        caption=f"group_size={options['group_size']} residual_length={options['residual_length']} "
        f"sink_length={options['sink_length']}; a model in {result['dtype']}. K, V: bits of keys and values.\n"
        "Nominal: codes, and the window at 16 bits. Stored: also scales, minima, sinks, the window's whole ring "
        "and room for growth.",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    columns = ("tokens", "K, V", "nominal bits", "ratio", "share", "stored bits", "ratio", "MB", "float16 MB")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        cells = [str(row["tokens"]), _bits(row)]
        nominal, stored = row["nominal"], row["stored"]
        cells += [f"{nominal['bits']:.2f}", f"{nominal['ratio']:.2f}x", f"{1 / nominal['ratio']:.1%}"]
        cells += [f"{stored['bits']:.2f}", f"{stored['ratio']:.2f}x", f"{stored['bytes'] / 1e6:,.1f}"]
        table.add_row(*cells, f"{row['float16_bytes'] / 1e6:,.1f}")
    return table


def fit_table(result: dict[str, Any]) -> Table:
    """The longest context and the largest batches, a column a pair of bits and one for float16."""
    gpu, batch = result["gpu"], result["rows"][0]["batch"]
    table = Table(
        title=f"In {gpu['memory']}, beside weights of {decimal(gpu['weights_bytes'])}: {decimal(gpu['room_bytes'])} of cache",
        caption=f"The model's own context ends at {result['shape']['max_position_embeddings']:,} tokens.",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    columns = {_bits(fit): fit for fit in gpu["fits"]} | {"float16": gpu["float16"]}
    table.add_column("K, V")
    for name in columns:
        table.add_column(name, justify="right")
    longest = [column["longest_context"] for column in columns.values()]
    most = [f"{tokens:,}" if tokens < MOST_TOKENS else f"{MOST_TOKENS:,} or more" for tokens in longest]
    table.add_row(f"longest context, batch {batch} (tokens)", *most)
    for tokens in gpu["float16"]["largest_batch"]:
        table.add_row(f"largest batch at {tokens:,}", *(f"{c['largest_batch'][tokens]:,}" for c in columns.values()))
    return table
