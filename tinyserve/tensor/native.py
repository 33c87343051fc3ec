"""What Numba lacks of the machine: words at addresses, atomics, locks that need no interpreter, arrays on the stack.

Knows no kernel. An address is an int64; a word has 64 bits.
"""

import platform
import sys

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

WORD = ir.IntType(64)
_I32 = ir.IntType(32)
X86, ARM = (platform.machine().lower() in names for names in (("x86_64", "amd64"), ("aarch64", "arm64")))


def _at(builder, address):
    return builder.inttoptr(address, WORD.as_pointer())


def _function(builder, name, result, *arguments):
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


# --- words that several threads read and write ------------------------------------------------------------------------


@intrinsic
def load_word(typing_context, address):
    """The word at an address, and with it all that was written before it was stored there."""

    def codegen(context, builder, sig, args):
        return builder.load_atomic(_at(builder, args[0]), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def store_word(typing_context, address, value):
    """Store a word where others will read it, after all that was written before."""

    def codegen(context, builder, sig, args):
        builder.store_atomic(args[1], _at(builder, args[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def fetch_add(typing_context, address, value):
    """Add to the word at an address, in one step; returns what was there."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", _at(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def exchange(typing_context, address, value):
    """Put a word in the place of another, in one step; returns the other."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("xchg", _at(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


# --- waiting ----------------------------------------------------------------------------------------------------------


@intrinsic
def pause(typing_context):
    """Tell the processor that this thread is looking again and again."""

    def codegen(context, builder, sig, args):
        if X86:
            builder.call(_function(builder, "llvm.x86.sse2.pause", ir.VoidType()), [])
        elif ARM:
            builder.call(_function(builder, "llvm.aarch64.hint", ir.VoidType(), _I32), [_I32(1)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def yield_processor(typing_context):
    """Let other threads have this processor."""

    def codegen(context, builder, sig, args):
        builder.call(_function(builder, "SwitchToThread" if sys.platform == "win32" else "sched_yield", _I32), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def acquire_lock(typing_context, lock):
    """Wait for a lock of Python's own (`PyThread_allocate_lock`), asleep, and without holding the interpreter."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], cgutils.voidptr_t)
        builder.call(_function(builder, "PyThread_acquire_lock", _I32, cgutils.voidptr_t, _I32), [pointer, _I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def release_lock(typing_context, lock):
    """Release it; any thread may."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], cgutils.voidptr_t)
        builder.call(_function(builder, "PyThread_release_lock", ir.VoidType(), cgutils.voidptr_t), [pointer])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def ticks(typing_context):
    """A clock of the processor's, in units of its own."""

    def codegen(context, builder, sig, args):
        if ARM:  # whose cycles are the system's to count, and whose clock LLVM knows by its register
            read = _function(builder, "llvm.read_volatile_register.i64", WORD, ir.MetaDataType())
            return builder.call(read, [builder.module.add_metadata(["CNTVCT_EL0"])])
        return builder.call(_function(builder, "llvm.readcyclecounter", WORD), [])

    return types.int64(), codegen


# --- code and data at addresses ---------------------------------------------------------------------------------------


@intrinsic
def call(typing_context, code, block, thread, threads, claims):
    """Call the entry of an instruction by its address (program.py makes them)."""

    def codegen(context, builder, sig, args):
        entry = ir.FunctionType(ir.VoidType(), [WORD, WORD, WORD, WORD, cgutils.voidptr_t])
        nothing = ir.Constant(cgutils.voidptr_t, None)
        builder.call(builder.inttoptr(args[0], entry.as_pointer()), [*args[1:], nothing])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def arguments(typing_context, block, kinds):
    """The values of these types, a tuple type, that `program.describe` wrote as words at an address."""
    whole = kinds.instance_type

    def codegen(context, builder, sig, args):
        base, position = _at(builder, args[0]), 0

        def word():
            nonlocal position
            position += 1
            return builder.load(builder.gep(base, [WORD(position - 1)]))

        def value(kind):
            if isinstance(kind, types.BaseTuple):
                return context.make_tuple(builder, kind, [value(part) for part in kind])
            if isinstance(kind, types.Array):
                return _array(context, builder, kind, word(), [word() for _ in range(kind.ndim)])
            if kind == types.float32:
                return builder.bitcast(builder.trunc(word(), _I32), ir.FloatType())
            return word()

        return value(whole)

    return whole(types.int64, kinds), codegen


@intrinsic(prefer_literal=True)
def stack_array(typing_context, size, dtype):
    """An array (size,) that lives as long as the call of its kernel; the size is a constant."""
    if not isinstance(size, types.IntegerLiteral):
        raise TypingError("the size of an array on the stack is a constant of the kernel")
    kind = types.Array(dtype.dtype, 1, "C")
    count = size.literal_value

    def codegen(context, builder, sig, args):
        element = context.get_data_type(kind.dtype)
        room = cgutils.alloca_once(builder, ir.ArrayType(element, count))
        room.align = 64
        return _array(context, builder, kind, builder.ptrtoint(room, WORD), [WORD(count)])

    return kind(size, dtype), codegen


def _array(context, builder, kind, address, shape):
    """A contiguous array that nobody owns."""
    itemsize = context.get_abi_sizeof(context.get_data_type(kind.dtype))
    strides: list = []
    step = WORD(itemsize)
    for length in reversed(shape):
        strides.insert(0, step)
        step = builder.mul(step, length)
    array = context.make_array(kind)(context, builder)
    populate_array(
        array,
        data=builder.inttoptr(address, context.get_data_type(kind.dtype).as_pointer()),
        shape=shape,
        strides=strides,
        itemsize=WORD(itemsize),
        meminfo=None,
    )
    return array._getvalue()
