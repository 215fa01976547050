"""Unpickling that can build tensors, containers and numbers, and nothing else.

A pickle is a program: GLOBAL and STACK_GLOBAL name any importable object and REDUCE calls it. Two fences
stand here. First the whole opcode stream is read without running it, and every opcode or name outside a short
list is refused. Then the standard unpickler runs with a `find_class` that imports nothing: it returns this
module's own inert objects, whose `__setstate__` refuses, so that no attribute of anything can be set either.

A TorchScript archive pickles instances of classes that its own code defines (`__torch__.…`). With `script=True`, and
only then, NEWOBJ is let through, and every such name stands for one class of this module: a dict of the attributes.
The code in the archive is never looked at.
"""

import io
import math
import pickle
import pickletools
import reprlib
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxalign.interop.dtypes import TORCH, TORCH_STORAGE

# Opcodes that push numbers, strings and containers, plus the four that state dicts need to rebuild tensors.
# Left out on purpose: INST, OBJ, NEWOBJ, NEWOBJ_EX (make instances), EXT1/2/4 (take objects out of a
# process-wide cache without asking find_class), sets, bytes and out-of-band buffers.
_ALLOWED = """
    PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1
    LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE
    BINUNICODE8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT
    SETITEM SETITEMS GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE
    BUILD BINPERSID
"""
_OPCODES = frozenset(_ALLOWED.split())
# The C unpickler makes instances of types alone; `Attributes` is the only type that `find_class` ever returns.
_SCRIPT_OPCODES = _OPCODES | {"NEWOBJ"}
_DEEPEST = 100  # tuples in tuples: C recurses into them without a guard to hash one, and runs off its stack
_HELD = 1_000_000  # tuples below a tuple, counted wherever they are held, as hashing it or writing it out does
_BITS = 4096  # of a number; torch.save's own have up to 80
_AXES = 32  # of a tensor: as many as every NumPy takes
_EXPANDED = 2**30  # bytes that a tensor may stand for by strides of zero, where they are more than its storage has


def shown(thing: Any) -> str:
    """The beginning of a thing's text; the whole of one that holds another many times over would fill the memory."""
    return reprlib.repr(thing)[:60]


class Damaged(ValueError):
    """The bytes are not a whole, well-formed pickle."""


class Refused(ValueError):
    """The pickle wants something other than tensors, containers and numbers."""


class _Inert:
    """Base of everything `find_class` may return: BUILD finds this `__setstate__` before any attribute."""

    __slots__ = ()

    def __setstate__(self, state):
        raise Refused(f"setting the state of a {type(self).__name__.strip('_')}")


class _StateDict(dict):
    """Stands in for OrderedDict. PyTorch hangs `_metadata` (version numbers) on it, which is dropped here."""

    __slots__ = ()

    def __setstate__(self, state):
        pass


class Attributes(dict):
    """Stands in for an instance of any class of a TorchScript archive: its attributes by name."""

    __slots__ = ()

    def __new__(cls, *arguments):
        if arguments:
            raise Refused("a TorchScript object made with arguments")
        return super().__new__(cls)

    def __init__(self, *arguments):
        super().__init__()

    def __setstate__(self, state):
        if type(state) is not dict or not all(type(name) is str for name in state):
            raise Refused("a TorchScript object with a state of its own making")
        self.update(state)


class _Callable(_Inert):
    """The only callable a pickle can meet."""

    __slots__ = ("_function",)

    def __init__(self, function):
        self._function = function

    def __call__(self, *args):
        return self._function(*args)


class StorageType(_Inert):
    """A typed (or, with `dtype=None`, untyped) storage class of PyTorch, as a name in a persistent id."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype | None):
        self.dtype = dtype


class DType(_Inert):
    """A dtype object of PyTorch, as an argument of _rebuild_tensor_v3."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype


class Storage(_Inert):
    """Bytes in the file: `length` elements of `dtype`, from element `start` of the storage called `key`."""

    __slots__ = ("dtype", "key", "length", "start")

    def __init__(self, key: str, dtype: np.dtype | None, length: int, start: int = 0):
        self.key, self.dtype, self.length, self.start = key, dtype, length, start

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize if self.dtype else 1


class Tensor(_Inert):
    """A strided window on a storage. Sizes, strides and offset count elements of `dtype`."""

    __slots__ = ("dtype", "offset", "shape", "storage", "strides")

    def __init__(self, storage: Storage, dtype: np.dtype, offset: int, shape: tuple, strides: tuple):
        self.storage, self.dtype, self.offset = storage, dtype, offset
        self.shape, self.strides = shape, strides

    @property
    def end(self) -> int:
        """Bytes of the storage up to the tensor's last one."""
        if 0 in self.shape:
            return 0
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize


def _rebuild_tensor(storage, offset, size, stride, *_ignored, dtype=None):
    """torch/_utils.py `_rebuild_tensor` and `_v2`; gradients' flag, hooks and metadata are not weights."""
    if not isinstance(storage, Storage):
        raise Damaged("a tensor without a storage")
    shape, strides = tuple(size), tuple(stride)
    dtype = dtype or storage.dtype
    if dtype is None:
        raise Damaged("a tensor on an untyped storage without a dtype")
    if len(shape) != len(strides) or not all(type(v) is int and v >= 0 for v in (offset, *shape, *strides)):
        raise Damaged(f"a tensor with offset {shown(offset)}, size {shown(size)}, stride {shown(stride)}")
    if len(shape) > _AXES:
        raise Damaged(f"a tensor with {len(shape)} axes")
    # A stride that is never walked may be anything; NumPy wants all of them to be numbers of 64 bits.
    strides = tuple(s if n > 1 and 0 not in shape else 0 for n, s in zip(shape, strides, strict=True))
    tensor = Tensor(storage, dtype, offset, shape, strides)
    bytes_there = storage.length * storage.width
    if tensor.end > bytes_there:
        raise Damaged(f"a tensor of size {shape} reaches beyond its storage of {bytes_there} bytes")
    if math.prod(n for n in shape if n) * dtype.itemsize > max(bytes_there, _EXPANDED):
        raise Damaged(f"a tensor of size {shape} of a storage of {bytes_there} bytes")
    return tensor


def _rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, *_ignored):
    """torch/_utils.py `_rebuild_tensor_v3`: for dtypes that have no typed storage (uint16, float8, ...)."""
    if not isinstance(dtype, DType):
        raise Damaged("a tensor whose dtype is no dtype")
    return _rebuild_tensor(storage, offset, size, stride, dtype=dtype.dtype)


def _rebuild_parameter(data, *_ignored):
    """torch/_utils.py `_rebuild_parameter`: a Parameter is its tensor."""
    if not isinstance(data, Tensor):
        raise Damaged("a Parameter without a tensor")
    return data


def _ordered_dict(items=()):
    return _StateDict(items)


def _size(items=()):
    if not all(type(item) is int for item in items):
        raise Damaged("a torch.Size of what are no numbers")
    return tuple(items)


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Callable(_ordered_dict),
    ("torch", "Size"): _Callable(_size),
    ("torch._utils", "_rebuild_tensor"): _Callable(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Callable(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _Callable(_rebuild_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): _Callable(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _Callable(_rebuild_parameter),
    ("torch.storage", "UntypedStorage"): StorageType(None),
    **{("torch", name): DType(dtype) for name, dtype in TORCH.items()},
    # Files saved from a GPU before PyTorch 1.6 name torch.cuda.FloatStorage.
    **{
        (module, name): StorageType(dtype)
        for module in ("torch", "torch.cuda")
        for name, dtype in TORCH_STORAGE.items()
    },
}


def _plain(value, *_ignored):
    """torch/jit/_pickle.py: lists and dicts with a type's name beside them are lists and dicts."""
    return value


# What TorchScript's pickler may name beside the archive's classes; `build_tensor_from_id` needs a table of tensors
# outside the pickle, which files do not have.
_SCRIPT_GLOBALS: dict[tuple[str, str], Any] = {
    ("torch.jit._pickle", name): _Callable(_plain)
    for name in ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "restore_type_tag")
}


def _resolve(module: str, name: str, script: bool) -> Any:
    """The inert object that a name stands for; Refused for all others."""
    # A dotted name would walk attributes (torch._utils + os.system): only exact pairs are known here.
    if (module, name) in _GLOBALS:
        return _GLOBALS[module, name]
    if script:
        if (module, name) in _SCRIPT_GLOBALS:
            return _SCRIPT_GLOBALS[module, name]
        if module.split(".")[0] == "__torch__" and all(part.isidentifier() for part in (*module.split("."), name)):
            return Attributes
    raise Refused(f"{module}.{name}")


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, storage, script):
        super().__init__(file, fix_imports=False, encoding="utf-8")
        self._storage, self._script = storage, script

    def find_class(self, module, name):
        return _resolve(module, name, self._script)

    def persistent_load(self, pid):
        is_storage = isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"
        if not is_storage or self._storage is None:
            what = pid[0] if isinstance(pid, tuple) and pid else pid
            raise Refused(f"an external object {shown(what)}, which is not a storage")
        return self._storage(pid)


def scan(stream: io.BufferedIOBase, script: bool = False) -> bytes:
    """Reads one pickle from `stream` without running it, checks its opcodes and names, and returns its bytes.

    `script`: the pickle is a TorchScript archive's. Raises Refused (names the target) or Damaged (not a pickle, or cut
    off).
    """
    start = stream.tell()
    strings: list[Any] = [None, None]  # the latest two pushed: what STACK_GLOBAL will most likely take
    memo: dict[int, tuple[Any, _Nesting]] = {}  # (string or None, nesting)
    stack: list[_Nesting | None] = []  # None: a mark
    last_was_string, target = False, ""
    try:
        for opcode, argument, position in pickletools.genops(stream):
            name = opcode.name
            if name in ("GLOBAL", "INST"):
                target = argument.replace(" ", ".", 1)
                _resolve(*argument.split(" ", 1), script)
            elif name == "STACK_GLOBAL" and None not in strings[-2:]:
                target = ".".join(strings[-2:])
                _resolve(*strings[-2:], script)
            if name not in (_SCRIPT_OPCODES if script else _OPCODES):
                of = f" (of {target})" if target else ""
                raise Refused(f"the opcode {name}{of} at byte {position - start}")
            # Memo slots are counted by pickle; an absurd index is only there to make the unpickler allocate.
            if name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > position - start:
                raise Damaged(f"memo index {argument} at byte {position - start}")
            if type(argument) is int and argument.bit_length() > _BITS:
                raise Damaged(f"a number of {argument.bit_length()} bits at byte {position - start}")
            _follow(opcode, stack)
            # Follow strings through the memo, so that a refusal by STACK_GLOBAL can name its target.
            if name == "MEMOIZE" or name.endswith("PUT"):
                index = len(memo) if name == "MEMOIZE" else argument
                memo[index] = (strings[-1] if last_was_string else None, _top(stack))
                continue
            if name.endswith("GET"):
                argument, stack[-1] = memo.get(argument, (None, _FLAT))
            last_was_string = isinstance(argument, str) and name not in ("GLOBAL", "INT", "LONG", "FLOAT")
            if last_was_string:
                strings = [strings[-1], argument]
    except (Refused, Damaged):
        raise
    except Exception as error:  # pickletools raises ValueError, but also what decoding and struct raise
        raise Damaged(str(error) or type(error).__name__) from error
    end = stream.tell()
    stream.seek(start)
    return stream.read(end - start)


_Nesting = tuple[int, int]  # of tuples in an object: how deep, how many
_FLAT = (0, 0)


def _follow(opcode: pickletools.OpcodeInfo, stack: list[_Nesting | None]) -> None:
    """What an opcode does to the nesting of tuples on the stack. Damaged: too deep, or it takes what is not there."""
    before, taken = opcode.stack_before, []
    if opcode.name == "MARK" or (opcode.name == "POP" and stack and stack[-1] is None):
        stack.append(None) if opcode.name == "MARK" else stack.pop()
        return
    if pickletools.markobject in before:
        while _top(stack, mark=True) is not None:
            taken.append(stack.pop())
        stack.pop()
        before = before[: before.index(pickletools.markobject)]
    for _ in before:
        taken.append(_top(stack))
        stack.pop()
    if opcode.name.startswith("TUPLE"):
        nesting = 1 + max((depth for depth, _ in taken), default=0), 1 + sum(held for _, held in taken)
        if nesting[0] > _DEEPEST or nesting[1] > _HELD:
            raise Damaged(f"tuples nested more than {_DEEPEST} deep, or more than {_HELD:,} of them in one")
    elif opcode.name == "REDUCE":  # at most the arguments themselves come back
        nesting = max(depth for depth, _ in taken), max(held for _, held in taken)
    else:  # the container that something was put into, or something new
        nesting = taken[-1] if before else _FLAT
    stack += [nesting] * len(opcode.stack_after)


def _top(stack: list[_Nesting | None], mark: bool = False) -> _Nesting | None:
    if not stack or (stack[-1] is None and not mark):
        raise Damaged("its stack is empty")
    return stack[-1]


def load(stream: io.BufferedIOBase, storage: Callable[[tuple], Storage] | None = None, *, script: bool = False) -> Any:
    """Loads one pickle from `stream`, which is left just behind it.

    `storage` turns a persistent id ('storage', type, key, location, length, ...) into a Storage; without it
    any persistent id is refused. `script`: objects of a TorchScript archive become `Attributes`. Returns dicts, lists,
    tuples, strings, numbers, None and Tensor records. Raises Refused (names the target) or Damaged.
    """
    data = scan(stream, script)
    try:
        return _Unpickler(io.BytesIO(data), storage, script).load()
    except (Refused, Damaged):
        raise
    except Exception as error:  # a malformed program fails in many ways; none of them has run anything
        raise Damaged(f"{type(error).__name__}: {error}") from error
