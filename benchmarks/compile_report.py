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

`--check` exits with 1 where a kernel spills (in float32, which is for comparing and not for speed, more than 64 bytes a thread),
where the loop has too few copies of 16 bytes a thread for its codes (24 bytes a token, 2 bits and heads of 96, allow none), or
spends more than 4 instructions per code in the reference variant (2 bits, head 128, 4 query heads a KV head, sm_90).
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
from modules.kernels.triton import append, attention, checks, combine, launch, pack  # noqa: E402
from modules.kernels.triton.arguments import Rows, Side  # noqa: E402
from modules.kernels.triton.softmax import Partial  # noqa: E402
from modules.options import KIVIOptions  # noqa: E402

ARCHITECTURES = (80, 90, 100)
SHARED = {80: 167936, 86: 102400, 89: 102400, 90: 233472, 100: 233472, 120: 102400}  # bytes a multiprocessor
TYPES = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);")
MOST_PER_CODE = 4.0
MOST_SPILLED = {"float32": 64}  # bytes a thread, by the type of the states; none where it is not here
_COPY = 16  # bytes of the widest copy of a thread
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


def _aligned(types, name: str, unaligned: tuple[str, ...], path: tuple[int, ...]) -> dict[tuple[int, ...], list]:
    """Attributes of pointers and sizes that are multiples of 16, those in tuples included."""
    if isinstance(types, tuple):
        parts = (_aligned(part, name, unaligned, (*path, index)) for index, part in enumerate(types))
        return {where: attribute for part in parts for where, attribute in part.items()}
    aligned = name not in unaligned and (types.startswith("*") or types == "i32")
    return {path: [["tt.divisibility", 16]]} if aligned else {}


def compile_kernel(
    kernel,
    types: dict[str, str | tuple],
    constants: dict[str, object],
    arch: int,
    unaligned: tuple[str, ...] = (),
    **options: int | bool | None,
):
    """Compile a jitted kernel as a launch would with pointers and sizes that are multiples of 16."""
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    attributes = {}
    for index, name in enumerate(kernel.arg_names):
        if name not in constants:
            attributes |= _aligned(signature[name], name, unaligned, (index,))
    source = ASTSource(kernel, signature, constants, attributes)
    options = launch.OPTIONS | options
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
    return min(1.0, _COPY * _WARP * len(copies) / code_bytes)


def describe(kernel: str, variant: str, arch: int, compiled) -> tuple[Compiled, list[tuple[int, str]]]:
    """The row of a compiled kernel and its instructions."""
    resources, instructions = machine_code(compiled.asm["cubin"])
    spilled = resources.get("STACK", 0) + resources.get("LOCAL", 0)
    shared = max(resources.get("SHARED", 0), compiled.metadata.shared)
    return Compiled(kernel, variant, arch, resources["REG"], spilled, shared), instructions


def _rows(states: str) -> Rows:
    return Rows(states, "i32", "i32", "i32")


def _side(
    bits: int,
    states: str,
    codes: str = "*u8",
    scale: str = "*fp16",
    minimum: str = "*fp16",
    static: bool = False,
) -> Side:
    """The types of a side's tensors; codes stand for what there is not."""
    if static:
        return Side("*i8", "*i8", "*i8", "*i8", "*i8", states, states)
    if bits == 16:
        return Side(states, states, states, states, states, states, states)
    return Side(codes, scale, minimum, "*u8", "*i64", states, states)


def _packed_side(what: str, bits: int, small_metadata: bool) -> Side:
    """The types of a side of bfloat16 states that packing writes."""
    scale, minimum = ("*u8", "*fp16" if what == "keys" else "*i8") if small_metadata else ("*fp16", "*fp16")
    return _side(bits, "*bf16", scale=scale, minimum=minimum)


def _words(per_word: int, item: int) -> str:
    """The type of integers that hold `per_word` numbers of `item` bytes."""
    return f"*i{8 * per_word * item}"


def attending(
    shape: launch.Shape, rows: int, dtype: str, arch: int, pipeline: launch.Pipeline | None = None
) -> Compiled:
    """Compile `attend_splits`, with the default pipeline where none is given; the main loop is the one with most tensor-core
    instructions on packed codes."""
    item, many_rows = 4 if dtype == "float32" else 2, rows > launch.FEW_ROWS
    pipeline = pipeline or launch.default_pipeline(shape, many_rows, item, SHARED[arch])
    tile = launch.attention_tile(shape, many_rows, pipeline, item)
    states = TYPES[dtype]
    small = shape.v_small_metadata
    scale = _words(tile.META_PER_WORD, 1 if small else 2)
    minimum = scale if small else "*fp16"
    types = dict.fromkeys(attention.attend_splits.arg_names, "i32")
    types |= dict.fromkeys(("query", "new_keys", "new_values"), _rows(states))
    static = shape.static
    types |= {"keys": _side(shape.k_bits, states, scale="*i32" if shape.k_small_metadata else "*fp16", static=static)}
    types |= {"values": _side(shape.v_bits, states, "*i16", scale, minimum, static=static)}
    types |= {"counts": "*i32", "new_lengths": "*i32", "partial": Partial("*fp32", "*fp32"), "factor": "fp32"}
    constants = {"ALL_NEW": True, "TILE": tile}
    numbers = ("sequences", "new_tokens", "splits", "row_blocks")
    options = launch.attention_options(tile)
    compiled = compile_kernel(attention.attend_splits, types, constants, arch, numbers, **options)
    name = f"{_stored(shape)} {dtype}, {rows} rows"
    result, instructions = describe("attend_splits", name, arch, compiled)
    # The loop over codes masks them; the loop over full-precision tokens does not.
    body = max(loops(instructions), key=lambda b: sum(opcode(t).startswith(("LOP3", "LDGSTS")) for t in b))
    elements = tile.U * tile.T * shape.head_dim
    code_bytes = elements * (16 if static else sum(bits for bits in (shape.k_bits, shape.v_bits) if bits < 16)) // 8
    result.loop = len(body)
    result.per_code = len(body) / (2 * elements / _WARP)
    copied = code_bytes and shape.head_dim * min(shape.k_bits, shape.v_bits) // 8 % _COPY == 0
    result.wide_copies = wide_copies(body, code_bytes) if copied else None
    result.opcodes = dict(collections.Counter(opcode(text) for text in body).most_common())
    return result


def _stored(shape: launch.Shape) -> str:
    """What a kernel reads, in short."""
    if shape.static:
        return f"static int8 D{shape.head_dim}"
    groups = f"G{shape.group_size}/{shape.value_group_size} W{shape.wide}"
    groups += " M8" if shape.k_small_metadata or shape.v_small_metadata else ""
    return f"K{shape.k_bits} V{shape.v_bits} D{shape.head_dim} {groups}"


def combination(head_dim: int, dtype: str, arch: int) -> Compiled:
    """Compile `combine_splits`."""
    kernel = combine.combine_splits
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= {"partial": Partial("*fp32", "*fp32"), "new_lengths": "*i32", "out": TYPES[dtype]}
    constants = {"D": head_dim, "D_PAD": triton.next_power_of_2(head_dim), "N": 8, "KV_HEADS": 8, "GROUP": 4}
    constants |= {"ALL_NEW": True, "PARTS": launch.COMBINED}
    compiled = compile_kernel(kernel, types, constants, arch, ("parts", "row_blocks", "new_tokens"))
    return describe("combine_splits", f"D{head_dim} {dtype}", arch, compiled)[0]


def packing(
    what: str, bits: int, method: str, head_dim: int, group_size: int, arch: int, wide: int = 0, small: bool = False
) -> Compiled:
    """Compile `pack_states` for the keys or the values; `small` metadata has 8 bits."""
    types = dict.fromkeys(pack.pack_states.arg_names, "i32")
    types |= {"new": _rows("*bf16"), "side": _packed_side(what, bits, small), "mark": "*i32"}
    sizes = head_dim, group_size, bits, method, wide
    constants = {"TILE": launch.pack_tile_of(what == "keys", *sizes, small_metadata=small)}
    numbers = ("heads", "first_token", "blocks")
    compiled = compile_kernel(pack.pack_states, types, constants, arch, numbers)
    name = f"{what} {bits} bits {method} D{head_dim} G{group_size}{_metadata(wide, small)}"
    return describe("pack_states", name, arch, compiled)[0]


def _metadata(wide: int, small: bool) -> str:
    """What a variant with metadata of 8 bits is called beside the others."""
    return f" W{wide} M8" if small else ""


def appending_static(head_dim: int, arch: int) -> Compiled:
    """Compile `append_step` for static INT8."""
    types = dict.fromkeys(append.append_step.arg_names, "i32")
    types |= dict.fromkeys(("new_keys", "new_values"), _rows("*bf16"))
    types |= dict.fromkeys(("keys", "values"), _side(16, "*bf16", static=True))
    types |= {"energy": "*i32", "counts": "*i32", "new_lengths": "*i32"}
    tile = launch.pack_tile_of(False, head_dim, 1, 16, "none", tokens=1)
    constants = {"SINK": 0, "RING": 1, "WINDOW": 1, "TOKENS": 1, "ALL_NEW": True}
    constants |= {"K_TILE": tile._replace(KEYS=True), "V_TILE": tile}
    compiled = compile_kernel(append.append_step, types, constants, arch, ("sequences", "heads"))
    return describe("append_step", f"static int8 D{head_dim}", arch, compiled)[0]


def appending(k_bits: int, v_bits: int, head_dim: int, arch: int, wide: int = 0, small: bool = False) -> Compiled:
    """Compile `append_step` with groups of 32, 4 sinks and a window of 128; `small` metadata has 8 bits."""
    types = dict.fromkeys(append.append_step.arg_names, "i32")
    types |= dict.fromkeys(("new_keys", "new_values"), _rows("*bf16"))
    types |= {"keys": _packed_side("keys", k_bits, small), "values": _packed_side("values", v_bits, small)}
    types |= {"energy": "*fp32", "counts": "*i32", "new_lengths": "*i32"}
    constants = {"SINK": 4, "RING": 160, "TOKENS": 32, "ALL_NEW": True}
    constants |= {"K_TILE": launch.pack_tile_of(True, head_dim, 32, k_bits, "lsq", wide, small_metadata=small)}
    value_g = 64 if wide and v_bits == 2 else 32
    constants |= {"V_TILE": launch.pack_tile_of(False, head_dim, value_g, v_bits, "clipped", small_metadata=small)}
    compiled = compile_kernel(append.append_step, types, constants, arch, ("sequences", "heads"))
    return describe("append_step", f"K{k_bits} V{v_bits} D{head_dim}{_metadata(wide, small)}", arch, compiled)[0]


def shape_of(
    head_dim: int,
    group_size: int,
    k_bits: int,
    v_bits: int,
    value_group_size: int | None = None,
    wide: int = 0,
    small: bool = False,
) -> launch.Shape:
    """A shape with 8 KV heads of 4 query heads, 4 sinks and a window of 128; `small` metadata has 8 bits."""
    value_g, k_small, v_small = value_group_size or group_size, small and k_bits < 8, small and v_bits < 8
    sizes = head_dim, group_size, k_bits, v_bits, 8, 4, 4, 128 + group_size, value_g, wide
    return launch.Shape(*sizes, k_small_metadata=k_small, v_small_metadata=v_small)


def static_shape(head_dim: int) -> launch.Shape:
    """Static INT8, which has neither sinks nor window, with the heads of `shape_of`."""
    block = launch.BLOCK_AT_ONCE
    return launch.Shape(head_dim, block, 16, 16, 8, 4, 0, 1, block, static=True, at_once=True)


REFERENCE = (shape_of(128, 32, 2, 2), 4, "float16")


def variants(quick: bool) -> list[tuple[launch.Shape, int, str]]:
    """What is compiled: everything people run with `quick`, else every bit pair, head, group size and type too."""
    chosen = [
        REFERENCE,
        (shape_of(128, 32, 2, 2, 64, 32), 4, "bfloat16"),
        (shape_of(128, 32, 4, 4, wide=32, small=True), 4, "bfloat16"),
        (shape_of(64, 32, 2, 2, 64, 16), 4, "bfloat16"),
        (shape_of(128, 32, 2, 2, 64, 32), 64, "bfloat16"),
        (static_shape(128), 4, "bfloat16"),
        (shape_of(128, 32, 2, 2, 64, 64, small=True), 4, "bfloat16"),
    ]
    if quick:
        return chosen
    chosen += [(shape_of(128, 32, 2, 2), rows, "bfloat16") for rows in (4, 64)]
    chosen += [(shape_of(128, 32, k, v), 4, "bfloat16") for k, v in itertools.product((2, 4, 8, 16), repeat=2)]
    chosen += [(shape_of(d, 32, b, b), 4, "bfloat16") for d in (64, 96, 256) for b in (2, 4, 8)]
    chosen += [(shape_of(128, g, b, b), 4, "bfloat16") for g in (16, 64, 128) for b in (2, 4, 8)]
    chosen += [(shape_of(d, 32, 2, 2, 64 if d % 64 == 0 else 32, d // 4), 4, "bfloat16") for d in (64, 96, 256)]
    chosen += [(shape_of(64, 32, 2, 2, 64, 16), 64, "bfloat16"), (shape_of(128, 32, 2, 2, 64, 32), 4, "float32")]
    chosen += [(shape_of(d, 32, 2, 2), 4, "float32") for d in checks.HEAD_DIMS]
    chosen += [
        (shape_of(d, 32, 2, 2, 64 if d % 64 == 0 else 32, min(d // 2, checks.MAX_WIDE), small=True), rows, "bfloat16")
        for d in checks.HEAD_DIMS
        for rows in (4, 64)
    ]
    chosen += [(shape_of(128, 32, k, v, small=True), 4, "bfloat16") for k, v in ((2, 2), (4, 4), (8, 2), (4, 16))]
    chosen += [
        (shape_of(d, 32, 4, 4, wide=KIVIOptions().wide_count(4, d), small=True), rows, "bfloat16")
        for d in checks.HEAD_DIMS
        for rows in (4, 64)
    ]
    chosen += [(shape_of(128, 32, 4, 2, 64, 32, small=True), 4, "bfloat16")]
    chosen += [(shape_of(128, 64, 4, 4, wide=32, small=True), 4, "bfloat16")]
    chosen += [(shape_of(128, 32, 2, 2, 64, 64, small=True), 4, "float32")]
    chosen += [(static_shape(d), rows, "bfloat16") for d in checks.HEAD_DIMS for rows in (4, 64)]
    chosen += [(static_shape(128), 4, dtype) for dtype in ("float16", "float32")]
    return list(dict.fromkeys(chosen))


def work(archs: tuple[int, ...], quick: bool) -> list[functools.partial[Compiled]]:
    """Everything to compile, as calls."""
    calls = []
    for arch in archs:
        calls += [functools.partial(attending, shape, rows, dtype, arch) for shape, rows, dtype in variants(quick)]
        head_dims = (128,) if quick else checks.HEAD_DIMS
        calls += [functools.partial(combination, d, "bfloat16", arch) for d in head_dims]
        calls += [
            functools.partial(packing, "keys", 2, "lsq", 128, 32, arch, wide=32),
            functools.partial(packing, "values", 2, "clipped", 128, 64, arch),
            functools.partial(appending, 2, 2, 128, arch, wide=32),
            functools.partial(appending_static, 128, arch),
            functools.partial(packing, "keys", 2, "lsq", 128, 32, arch, wide=64, small=True),
            functools.partial(packing, "values", 2, "clipped", 128, 64, arch, small=True),
            functools.partial(appending, 2, 2, 128, arch, wide=64, small=True),
            functools.partial(packing, "keys", 4, "lsq", 128, 32, arch, wide=32, small=True),
            functools.partial(appending, 4, 4, 128, arch, wide=32, small=True),
        ]
        if not quick:
            calls += [functools.partial(packing, what, 8, "lsq", 256, 128, arch) for what in ("keys", "values")]
            calls += [
                functools.partial(packing, what, 4, "lsq", 256, 32, arch, small=True) for what in ("keys", "values")
            ]
            calls += [functools.partial(appending, k, v, d, arch) for k, v, d in ((4, 16, 96), (16, 8, 64))]
    return calls


def report(calls: list[functools.partial[Compiled]], jobs: int) -> list[Compiled]:
    """Compile it all, `jobs` at a time."""
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        futures = [pool.submit(call) for call in calls]
        return [future.result() for future in track(futures, "compiling", console=Console(stderr=True))]


def problems(results: list[Compiled]) -> list[str]:
    """What `--check` refuses."""
    found = [
        f"{r.variant} sm_{r.arch}: {r.spilled} bytes spilled"
        for r in results
        if r.spilled > max((most for dtype, most in MOST_SPILLED.items() if dtype in r.variant), default=0)
    ]
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
