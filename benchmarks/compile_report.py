"""Compile every Triton kernel for GPUs that need not be present, and read the machine code.

    python benchmarks/compile_report.py                       # every variant, half an hour on two cores
    python benchmarks/compile_report.py --quick --arch 90     # the variants people run most
    python benchmarks/compile_report.py --json report.json --check

Columns: registers a thread; bytes spilled (stack and local memory); static plus dynamic shared memory; and, for attention,
the share of the main loop's bytes of codes that could come in copies of 16 bytes a thread (1 where there are enough such
copies for all of them), and instructions per code: the SASS instructions of the main
loop's body (from the target of its backward branch to that branch, every instruction counted, `NOP` too) over the codes a
thread accounts for in one iteration. An iteration of a warp covers `U*T` tokens, keys and values, so a thread's share is
`2*U*T*D/32` codes. Both sides are in the loop, so the figure is the mean of keys and values.

`--check` exits with 1 where a kernel spills, where the loop has too few copies of 16 bytes a thread for its codes, or spends
more than 4 instructions per code in the reference variant (2 bits, head 128, 4 query heads a KV head, sm_90).
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton  # noqa: E402
from report import compile_table  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from modules.cli.command import argument, check_least, parse  # noqa: E402
from modules.evaluation.environment import Environment  # noqa: E402
from modules.evaluation.results import BenchmarkResult, save_result  # noqa: E402
from modules.evaluation.tables import markdown  # noqa: E402
from modules.kernels import triton_attention, triton_quantize  # noqa: E402

ARCHITECTURES = (80, 90, 100)
SHARED = {80: 167936, 86: 102400, 89: 102400, 90: 233472, 100: 233472, 120: 102400}  # bytes a multiprocessor
TYPES = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);")
MOST_PER_CODE = 4.0
_WARP = 32  # threads


@dataclasses.dataclass
class Compiled:
    """What the compiler made of one kernel variant."""

    kernel: str
    variant: str
    arch: int
    registers: int
    spilled: int
    shared: int
    wide_copies: float | None = None
    loop: int | None = None
    per_code: float | None = None
    opcodes: dict[str, int] | None = None


def compile_kernel(
    kernel, types: dict[str, str], constants: dict[str, object], arch: int, unaligned=(), **options: int | bool | None
):
    """Compile a jitted kernel as a launch would with pointers and sizes that are multiples of 16."""
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = [
        index
        for index, name in enumerate(kernel.arg_names)
        if name not in constants
        and name not in unaligned
        and (signature[name].startswith("*") or signature[name] == "i32")
    ]
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    options = triton_quantize.LAUNCH_OPTIONS | options
    return triton.compile(source, target=GPUTarget("cuda", arch, _WARP), options=options)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_BIN / name, *arguments], check=True, capture_output=True, text=True).stdout


def machine_code(cubin: bytes) -> tuple[dict[str, int], list[tuple[int, str]]]:
    """Resources (`REG`, `STACK`, `LOCAL`, `SHARED`) and the instructions with their addresses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("cuobjdump", "--dump-sass", file.name)
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    lines = [match for line in sass.splitlines() if (match := _INSTRUCTION.match(line))]
    return resources, [(int(match[1], 16), match[2].strip()) for match in lines]


def opcode(instruction: str) -> str:
    """The opcode, without its predicate."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def loops(instructions: list[tuple[int, str]]) -> list[list[str]]:
    """Bodies of the innermost loops: what lies between the target of a backward branch and the branch."""
    spans = []
    for address, text in instructions:
        target = re.search(r"BRA\S*.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            spans.append((int(target[1], 16), address))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [[text for address, text in instructions if low <= address <= high] for low, high in inner]


def wide_copies(body: list[str], code_bytes: int) -> float:
    """Share of the `code_bytes` a warp needs an iteration that its copies of 16 bytes a thread make up, at most 1."""
    copies = [text for text in body if opcode(text).startswith("LDG") and ".128" in opcode(text)]
    return min(1.0, 16 * _WARP * len(copies) / code_bytes)


def describe(kernel: str, variant: str, arch: int, compiled) -> tuple[Compiled, list[tuple[int, str]]]:
    """The row of a compiled kernel and its instructions."""
    resources, instructions = machine_code(compiled.asm["cubin"])
    spilled = resources.get("STACK", 0) + resources.get("LOCAL", 0)
    shared = max(resources.get("SHARED", 0), compiled.metadata.shared)
    return Compiled(kernel, variant, arch, resources["REG"], spilled, shared), instructions


def attention(shape: triton_attention.Shape, rows: int, dtype: str, arch: int) -> Compiled:
    """Compile `attend_splits`; the main loop is the one with most tensor-core instructions on packed codes."""
    tile = triton_attention.tile_constants(shape, rows, 4 if dtype == "float32" else 2, SHARED[arch])
    states = TYPES[dtype]
    words = {1: "*i16", 2: "*i32", 4: "*i64"}[tile["META_PER_WORD"]]
    types = dict.fromkeys(triton_attention.attend_splits.arg_names, "i32")
    types |= dict.fromkeys(("q", "k_new", "v_new", "k_sinks", "k_window", "v_sinks", "v_window"), states)
    types |= {"k_codes": "*u8" if shape.k_bits < 16 else states, "v_codes": "*i16" if shape.v_bits < 16 else states}
    types |= dict.fromkeys(("k_scale", "k_minimum"), "*fp16" if shape.k_bits < 16 else states)
    types |= {"v_scale": words if shape.v_bits < 16 else states, "v_minimum": "*fp16" if shape.v_bits < 16 else states}
    types |= {"k_extra": "*u8", "k_order": "*i64"}
    types |= {"counts": "*i32", "new_lengths": "*i32", "part": "*fp32", "ml": "*fp32", "factor": "fp32"}
    constants = tile | {"ALL_NEW": True, "ASM": True}
    numbers = ("sequences", "new_tokens", "splits", "row_blocks")
    options = triton_attention.launch_options(tile)
    compiled = compile_kernel(triton_attention.attend_splits, types, constants, arch, numbers, **options)
    name = f"K{shape.k_bits} V{shape.v_bits} D{shape.head_dim} G{shape.group_size}/{shape.value_group_size} W{shape.wide} {dtype}, {rows} rows"
    result, instructions = describe("attend_splits", name, arch, compiled)
    # The loop over codes masks them; the loop over full-precision tokens does not.
    body = max(loops(instructions), key=lambda b: sum(opcode(t).startswith(("LOP3", "LDGSTS")) for t in b))
    elements = tile["U"] * tile["T"] * shape.head_dim
    code_bytes = elements * sum(bits for bits in (shape.k_bits, shape.v_bits) if bits < 16) // 8
    result.loop = len(body)
    result.per_code = len(body) / (2 * elements / _WARP)
    result.wide_copies = wide_copies(body, code_bytes) if code_bytes else None
    result.opcodes = dict(collections.Counter(opcode(text) for text in body).most_common())
    return result


def combination(head_dim: int, dtype: str, arch: int) -> Compiled:
    """Compile `combine_splits`."""
    names = triton_attention.combine_splits.arg_names
    types = dict.fromkeys(names, "i32") | {"part": "*fp32", "ml": "*fp32", "new_lengths": "*i32", "out": TYPES[dtype]}
    constants = dict(
        KV_HEADS=8, GROUP=4, D=head_dim, D_PAD=triton.next_power_of_2(head_dim), N=8, BLOCK=16, ALL_NEW=True
    )
    numbers = ("parts", "row_blocks", "new_tokens")
    compiled = compile_kernel(triton_attention.combine_splits, types, constants, arch, numbers)
    return describe("combine_splits", f"D{head_dim} {dtype}", arch, compiled)[0]


def packing(what: str, bits: int, method: str, head_dim: int, group_size: int, arch: int, wide: int = 0) -> Compiled:
    """Compile `pack_states` for the keys or the values."""
    types = dict.fromkeys(triton_quantize.pack_states.arg_names, "i32")
    types |= {"states": "*bf16", "codes": "*u8", "scale": "*fp16", "minimum": "*fp16", "mark": "*i32"}
    types |= {"extra": "*u8", "order": "*i64"}
    constants = {"KEYS": what == "keys", "D": head_dim, "G": group_size, "BITS": bits, "METHOD": method}
    constants |= {"WIDE": wide, "WIDE_PAD": max(4, wide)} | triton_quantize.tiles(head_dim, bits, 32)
    numbers = ("heads", "first_token")
    compiled = compile_kernel(triton_quantize.pack_states, types, constants, arch, numbers)
    return describe("pack_states", f"{what} {bits} bits {method} D{head_dim} G{group_size}", arch, compiled)[0]


def appending(k_bits: int, v_bits: int, head_dim: int, arch: int, wide: int = 0) -> Compiled:
    """Compile `append_step` with groups of 32, 4 sinks and a window of 128."""
    types = dict.fromkeys(triton_quantize.append_step.arg_names, "i32")
    types |= {"counts": "*i32", "extra": "*u8", "order": "*i64"}
    types |= dict.fromkeys(("key", "value", "k_sinks", "k_window", "v_sinks", "v_window"), "*bf16")
    for side, bits in (("k", k_bits), ("v", v_bits)):
        types |= {f"{side}_codes": "*u8" if bits < 16 else "*bf16"}
        types |= dict.fromkeys((f"{side}_scale", f"{side}_minimum"), "*fp16" if bits < 16 else "*bf16")
    constants = {"D": head_dim, "D_PAD": triton.next_power_of_2(head_dim), "G": 32, "K_BITS": k_bits, "V_BITS": v_bits}
    constants |= {"K_METHOD": "lsq", "V_METHOD": "clipped", "SINK": 4, "RING": 160}
    constants |= {"VALUE_G": 64 if wide else 32, "WIDE": wide, "WIDE_PAD": max(4, wide)}
    k_tile, v_tile = (triton_quantize.tiles(head_dim, bits, 32) for bits in (k_bits, v_bits))
    constants |= {"COLUMNS": k_tile["COLUMNS"], "TOKENS": v_tile["TOKENS"], "V_WIDTH_PAD": v_tile["WIDTH_PAD"]}
    numbers = ("sequences", "heads")
    compiled = compile_kernel(triton_quantize.append_step, types, constants, arch, numbers)
    return describe("append_step", f"K{k_bits} V{v_bits} D{head_dim}", arch, compiled)[0]


def shape_of(
    head_dim: int, group_size: int, k_bits: int, v_bits: int, value_group_size: int | None = None, wide: int = 0
) -> triton_attention.Shape:
    """A shape with 8 KV heads of 4 query heads, 4 sinks and a window of 128."""
    return triton_attention.Shape(
        head_dim, group_size, k_bits, v_bits, 8, 4, 4, 128 + group_size, value_group_size or group_size, wide
    )


REFERENCE = (shape_of(128, 32, 2, 2), 4, "float16")


def variants(quick: bool) -> list[tuple[triton_attention.Shape, int, str]]:
    """What is compiled: everything people run with `quick`, else every bit pair, head, group size and type too."""
    chosen = [
        REFERENCE,
        (shape_of(128, 32, 2, 2, 64, 32), 4, "bfloat16"),
        (shape_of(128, 32, 4, 4), 4, "bfloat16"),
        (shape_of(64, 32, 2, 2, 64, 16), 4, "bfloat16"),
        (shape_of(128, 32, 2, 2, 64, 32), 64, "bfloat16"),
    ]
    if quick:
        return chosen
    chosen += [(shape_of(128, 32, 2, 2), rows, "bfloat16") for rows in (4, 64)]
    chosen += [(shape_of(128, 32, k, v), 4, "bfloat16") for k, v in itertools.product((2, 4, 8, 16), repeat=2)]
    chosen += [(shape_of(d, 32, b, b), 4, "bfloat16") for d in (64, 96, 256) for b in (2, 4, 8)]
    chosen += [(shape_of(128, g, b, b), 4, "bfloat16") for g in (16, 64, 128) for b in (2, 4, 8)]
    chosen += [(shape_of(d, 32, 2, 2, 64 if d % 64 == 0 else 32, d // 4), 4, "bfloat16") for d in (64, 96, 256)]
    chosen += [(shape_of(64, 32, 2, 2, 64, 16), 64, "bfloat16"), (shape_of(128, 32, 2, 2, 64, 32), 4, "float32")]
    chosen += [(shape_of(d, 32, 2, 2), 4, "float32") for d in triton_attention.HEAD_DIMS]
    return list(dict.fromkeys(chosen))


def work(archs: tuple[int, ...], quick: bool) -> list[functools.partial[Compiled]]:
    """Everything to compile, as calls."""
    calls = []
    for arch in archs:
        calls += [functools.partial(attention, shape, rows, dtype, arch) for shape, rows, dtype in variants(quick)]
        head_dims = (128,) if quick else triton_attention.HEAD_DIMS
        calls += [functools.partial(combination, d, "bfloat16", arch) for d in head_dims]
        calls += [
            functools.partial(packing, "keys", 2, "lsq", 128, 32, arch, wide=32),
            functools.partial(packing, "values", 2, "clipped", 128, 64, arch),
            functools.partial(appending, 2, 2, 128, arch, wide=32),
        ]
        if not quick:
            calls += [functools.partial(packing, what, 8, "lsq", 256, 128, arch) for what in ("keys", "values")]
            calls += [functools.partial(appending, k, v, d, arch) for k, v, d in ((4, 16, 96), (16, 8, 64))]
    return calls


def report(calls: list[functools.partial[Compiled]], jobs: int) -> list[Compiled]:
    """Compile it all, `jobs` at a time."""
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        futures = [pool.submit(call) for call in calls]
        return [future.result() for future in track(futures, "compiling", console=Console(stderr=True))]


def problems(results: list[Compiled]) -> list[str]:
    """What `--check` refuses."""
    found = [f"{r.variant} sm_{r.arch}: {r.spilled} bytes spilled" for r in results if r.spilled]
    for r in results:
        if r.wide_copies is not None and r.wide_copies < 1:
            found.append(
                f"{r.variant} sm_{r.arch}: copies of 16 bytes a thread make up {r.wide_copies:.2f} of the codes"
            )
        if (
            "K2 V2 D128" in r.variant
            and ", 4 rows" in r.variant
            and r.arch == 90
            and r.per_code
            and r.per_code > MOST_PER_CODE
        ):
            found.append(f"{r.variant} sm_{r.arch}: {r.per_code:.2f} instructions per code, more than {MOST_PER_CODE}")
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    arch: tuple[int, ...] = argument(ARCHITECTURES, "compute capabilities", tuple(SHARED))
    quick: bool = argument(False, "only the variants people run most")
    jobs: int | None = argument(None, "kernels that are compiled at a time; None: as many as there are cores")
    json: Path | None = argument(None, "write everything here, opcode counts of the loops included")
    check: bool = argument(False, "exit with 1 where a limit is exceeded")

    def __post_init__(self) -> None:
        check_least(1 if self.jobs is None else self.jobs, 1, "--jobs")


def main() -> int:
    flags = parse(Flags, description=__doc__)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    results = report(work(flags.arch, flags.quick), flags.jobs or os.cpu_count() or 1)
    rows, beyond = [dataclasses.asdict(result) for result in results], problems(results)
    print(markdown(compile_table(rows)))
    if flags.json:
        settings = {"quick": flags.quick, "beyond_limits": beyond}
        save_result(BenchmarkResult("compile", rows, Environment.here(), settings), flags.json)
    if not flags.check:
        return 0
    print("\n".join(beyond), file=sys.stderr)
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
