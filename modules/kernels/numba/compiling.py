"""From the constants of a kernel to machine code: compiled once, kept on disk, and said aloud where it takes long.

A kernel is a function `(constants, address, stages, first, stop, thread)`: at `address` lies the record of its arguments,
`stages` says which of its stages to run and `first…stop` for which units. All kernels having one signature, one loop over
threads serves them all (`threads.py`), and none of them is compiled for threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import inspect
import pathlib
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator

from llvmlite import ir
from numba import cfunc, types
from numba.core import event
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, intrinsic, lower_getattr_generic, models, register_model

from modules.codecs import grouped, metadata, rotation, static
from modules.kernels.numba.vectors import I64, Emitter

TAKE_IN, UNITS, COMBINE = 1, 2, 4  # the stages of a kernel
ALL = TAKE_IN | UNITS | COMBINE

_CACHE_FAILURES = (RuntimeError, OSError)  # no folder that can be written to; a full disk


@functools.cache
def digest() -> str:
    """Of all sources that are compiled in: Numba's on-disk cache looks only at the file of the function it loads, not at
    what that calls, nor at constants of other files."""
    found = hashlib.sha256()
    paths = sorted(pathlib.Path(__file__).parent.glob("*.py"))
    for path in (*paths, *(pathlib.Path(inspect.getfile(module)) for module in (grouped, metadata, rotation, static))):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


class ConstantsType(types.Type):
    """The Numba type of a frozen dataclass whose attributes are compiled in; values of it are empty.

    One such dataclass is one compilation. `constants.value_of(name)` gives what `name` is in compiled code.
    """

    def __init__(self, constants) -> None:
        self.constants = constants
        fields = ", ".join(str(value) for value in dataclasses.astuple(constants))
        super().__init__(name=f"{type(constants).__name__}({fields}; {digest()})")


register_model(ConstantsType)(models.OpaqueModel)


@infer_getattr
class _ConstantsAttributes(AttributeTemplate):
    key = ConstantsType

    def generic_resolve(self, typ, name):
        return types.boolean if isinstance(typ.constants.value_of(name), bool) else types.int64


@lower_getattr_generic(ConstantsType)
def _lower_constant(context, builder, typ, value, name):
    number = typ.constants.value_of(name)
    return context.get_constant(types.boolean if isinstance(number, bool) else types.int64, number)


def emitting(emit: Callable[..., None]):
    """Code generation that calls `emit(emitter, *values)`, in a function of its own: its code stands once in a kernel."""

    def codegen(context, builder, signature, args):
        plan, values = signature.args[0].constants, args[1:]
        name = f"kivi.{emit.__name__}"
        function = builder.module.globals.get(name)
        if function is None:
            typ = ir.FunctionType(ir.VoidType(), [value.type for value in values])
            function = ir.Function(builder.module, typ, name)
            function.linkage = "internal"
            function.attributes.add("noinline")
            body = ir.IRBuilder(function.append_basic_block("entry"))
            emit(Emitter(body, plan), *function.args)
            body.ret_void()
        builder.call(function, values)
        return context.get_dummy_value()

    return codegen


def void_signature(plan, *args):
    """That of emitted code: floats are float32, all else int64."""
    return types.void(plan, *(types.float32 if isinstance(a, types.Float) else types.int64 for a in args))


@intrinsic
def as_pointer(typingctx, address):
    """An int64 as an address, for `numba.carray`."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), codegen


_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, *[ctypes.c_int64] * 5)


@intrinsic
def call_kernel(typingctx, kernel, address, stages, first, stop, thread):
    """Call the kernel at the address `kernel`."""

    def codegen(context, builder, signature, args):
        empty = ir.IntType(8).as_pointer()
        function = ir.FunctionType(ir.VoidType(), [empty, *[I64] * 5])
        pointer = builder.inttoptr(args[0], function.as_pointer())
        builder.call(pointer, [ir.Constant(empty, None), *args[1:]])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    Attributes:
        address: of its machine code.
        run: calls it from Python, without the interpreter's lock: `run(None, address, stages, first, stop, thread)`.
    """

    address: int
    run: Callable[..., None]


def compiled(function: Callable, constants) -> Kernel:
    """The kernel that `function` is with these constants, from Numba's on-disk cache where it is there."""
    signature = types.void(ConstantsType(constants), *[types.int64] * 5)
    what = f"{function.__name__.strip('_')} {constants.summary}"
    made = with_cache(lambda cache: cfunc(signature, cache=cache, error_model="numpy")(function), what)
    return Kernel(made.address, _KERNEL(made.address))


def with_cache(compile: Callable[[bool], object], what: str):
    """`compile(True)`, which keeps code on disk; where that is not possible `compile(False)`, and a warning."""
    with _progress(what):
        try:
            return compile(True)
        except _CACHE_FAILURES as error:
            made = compile(False)  # raises again where the cache was not the reason
            _warn_of_cache(str(error).splitlines()[0])
            return made


@functools.cache
def _warn_of_cache(problem: str) -> None:
    warnings.warn(
        f"Numba cannot keep compiled kernels on disk, so that every process compiles them anew ({problem}). Set "
        "NUMBA_CACHE_DIR to a folder that can be written to.",
        stacklevel=6,
    )


class _Announcer(event.Listener):
    """Says when this thread starts to compile, which loading from the cache does not."""

    def __init__(self, what: str) -> None:
        self.what, self.thread, self.started = what, threading.get_ident(), 0.0

    def on_start(self, event) -> None:
        if not self.started and threading.get_ident() == self.thread:
            self.started = time.perf_counter()
            print(f"KIVI compiles {self.what}: some seconds, once …", file=sys.stderr, flush=True)

    def on_end(self, event) -> None:
        pass


@contextlib.contextmanager
def _progress(what: str) -> Iterator[None]:
    announcer = _Announcer(what)
    with event.install_listener("numba:run_pass", announcer):
        yield
    if announcer.started:
        print(f"KIVI compiled it in {time.perf_counter() - announcer.started:.1f} s", file=sys.stderr, flush=True)
