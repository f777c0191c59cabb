"""The pickle inside a PyTorch file, read as a description of tensors; nothing is ever called.

A pickle is a program for a stack machine (Python's Lib/pickletools.py documents each opcode). This
one knows the opcodes that ``torch.save`` writes for mappings of tensors, and the few globals those
name; the globals become values of this module, never imported objects. Everything else is refused
by its name.
"""

import pickletools
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from skyreels_jax.errors import WeightsError
from skyreels_jax.weights.pickle_values import (
    GLOBALS,
    Constructor,
    OrderedMapping,
    PickledTensor,
    Storage,
    StorageType,
)
from skyreels_jax.weights.safetensors_file import Allowance

MAX_OPCODES: Final = 1_000_000
MAX_DEPTH: Final = 16
MAX_TEXT: Final = 4096
MAX_DIMENSIONS: Final = 16
# torch.save puts items into mappings by the thousand.
MAX_STACK: Final = 4096
# Memory is handed out in steps of 16 bytes.
_ROUNDING: Final = 16
# Bytes of a place in the memo, in a dictionary that has just doubled, in a list that is copied.
_MEMO_COST: Final = 10
_ENTRY_COST: Final = 100
_ITEM_COST: Final = 16


_NAMES: Final[Mapping[int, str]] = {ord(op.code): op.name for op in pickletools.opcodes}


def read_pickle(file: str, data: memoryview, allowance: Allowance) -> object:
    """What a pickle describes: mappings, lists, tuples, plain values and tensors.

    Args:
        file: what errors call it.
        data: the pickle.
        allowance: pays for the objects.

    Raises:
        WeightsError: naming the opcode or global that does not belong into a file of tensors, or
            saying that the pickle is corrupt.
    """
    machine = _Machine(file, data, allowance)
    try:
        return machine.run()
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise machine.corrupt(str(error)) from error


class _Machine:
    """Stack, memo and position of one reading."""

    def __init__(self, file: str, data: memoryview, allowance: Allowance):
        self.file = file
        self.data = data
        self.allowance = allowance
        self.position = 0
        self.stack: list[object] = []
        self.below: list[list[object]] = []
        self.memo: list[object] = []

    def run(self) -> object:
        for _ in range(MAX_OPCODES):
            code = self.take(1)[0]
            name = _NAMES.get(code, hex(code))
            if name == "STOP":
                return self.result()
            step = _STEPS.get(name)
            if step is None:
                raise self.refused(f"the pickle opcode {name}")
            step(self)
        raise WeightsError(f"{self.file} has a pickle of more than {MAX_OPCODES} steps")

    def result(self) -> object:
        value = self.stack.pop()
        if self.stack or self.below or self.position != len(self.data):
            raise self.corrupt("something is left when it stops")
        return value

    def corrupt(self, why: str) -> WeightsError:
        return WeightsError(
            f"{self.file} is corrupt: its pickle makes no sense at byte {self.position} ({why})"
        )

    def refused(self, what: str) -> WeightsError:
        return WeightsError(
            f"{self.file} is not to be trusted: it asks for {what}, which a file of tensors does "
            "not need. If you trust where it comes from, load it with torch and save its tensors "
            "as safetensors"
        )

    # Reading and stacking

    def take(self, count: int) -> memoryview:
        piece = self.data[self.position : self.position + count]
        if len(piece) != count:
            raise self.corrupt("it ends early")
        self.position += count
        return piece

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def push_new(self, value: object) -> None:
        self.allowance.spend(sys.getsizeof(value) + _ROUNDING)
        self.push(value)

    def push(self, value: object) -> None:
        if len(self.stack) == MAX_STACK:
            raise self.corrupt(f"more than {MAX_STACK} values wait")
        self.stack.append(value)

    def line(self) -> str:
        text, end, _ = bytes(self.data[self.position : self.position + MAX_TEXT]).partition(b"\n")
        if not end:
            raise self.corrupt("a name does not end")
        self.position += len(text) + 1
        return text.decode("utf-8")

    def since_mark(self) -> list[object]:
        items, self.stack = self.stack, self.below.pop()
        return items

    # Opcodes

    def protocol(self) -> None:
        if (protocol := self.number("<B")) != 2:
            raise WeightsError(
                f"{self.file} has a pickle of protocol {protocol}; torch.save writes protocol 2"
            )

    def mark(self) -> None:
        if len(self.below) == MAX_DEPTH:
            raise self.corrupt("it nests too deeply")
        self.below.append(self.stack)
        self.stack = []

    def text(self) -> None:
        length = self.number("<I")
        if length > MAX_TEXT:
            raise self.corrupt(f"a text of {length} bytes")
        self.push_new(bytes(self.take(length)).decode("utf-8"))

    def long(self) -> None:
        length = self.number("<B")
        if length > 8:
            raise self.corrupt(f"an integer of {length} bytes")
        self.push_new(int.from_bytes(self.take(length), "little", signed=True))

    def last(self, count: int) -> None:
        """Replace the ``count`` items on top by a tuple of them."""
        if len(self.stack) < count:
            raise self.corrupt("a tuple of too few items")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.push_new(items)

    def put(self, index: int) -> None:
        self.allowance.spend(_MEMO_COST)
        if index == len(self.memo):
            self.memo.append(self.stack[-1])
        elif index < len(self.memo):
            self.memo[index] = self.stack[-1]
        else:
            raise self.corrupt(f"memo entry {index} follows {len(self.memo)}")

    def set_items(self, pairs: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise self.corrupt("items for something that is no mapping")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str):
                raise self.refused(f"a mapping with a key of type {type(key).__name__}")
            if key in target:
                raise self.corrupt(f"{key[:200]!r} is there twice")
            self.allowance.spend(_ENTRY_COST)
            target[key] = value

    def extend(self, items: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise self.corrupt("items for something that is no list")
        self.allowance.spend(_ITEM_COST * len(items))
        target.extend(items)

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def find_global(self) -> None:
        name = f"{self.line()}.{self.line()}"
        if name not in GLOBALS:
            raise self.refused(f"the global {name[:200]!r}")
        self.push(GLOBALS[name])

    def storage(self) -> None:
        """A persistent id: ``("storage", storage class, key, device, element count)``."""
        match self.stack.pop():
            case ("storage", StorageType() as kind, str(key), str(), count) if _is_size(count):
                self.push_new(Storage(kind, key, count))
            case _:
                raise self.refused("a persistent id that is no storage")

    def apply(self) -> None:
        """What calling a constructor would give."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Constructor) or type(arguments) is not tuple:
            raise self.refused("a call of something that constructs no tensor")
        self.push_new(self.constructed(function, arguments))

    def constructed(self, function: Constructor, arguments: tuple[object, ...]) -> object:
        match function, arguments:
            case Constructor.ORDERED_DICT, ():
                return OrderedMapping()
            case Constructor.SIZE, (tuple() as sizes,) if all(map(_is_size, sizes)):
                return sizes
            case Constructor.PARAMETER, (PickledTensor() as tensor, bool(), dict(hooks)) if (
                not hooks
            ):
                return tensor
            case (
                Constructor.TENSOR,
                (Storage(type=StorageType(dtype=np.dtype() as dtype)) as storage, *view),
            ):
                return self.tensor(storage, dtype, view)
            case (
                Constructor.TENSOR_OF_BYTES,
                (Storage(type=StorageType(dtype=None)) as storage, *view, np.dtype() as dtype),
            ):
                return self.tensor(storage, dtype, view)
            case _:
                raise self.corrupt(f"{function.value} is given other arguments than it takes")

    def tensor(self, storage: Storage, dtype: np.dtype, view: list[object]) -> PickledTensor:
        """A view as torch describes it: offset, size, strides, requires_grad, backward hooks."""
        match view:
            case (int(offset), tuple(shape), tuple(strides), bool(), dict(hooks)) if not hooks:
                sound = all(map(_is_size, (offset, *shape, *strides)))
                if sound and len(shape) == len(strides) <= MAX_DIMENSIONS:
                    return PickledTensor(storage, dtype, offset, shape, strides)
        raise self.corrupt("a tensor with unsound offset, shape, strides or extras")

    def state(self) -> None:
        """``_metadata``, the one attribute that ``nn.Module.state_dict`` sets; not needed here."""
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, OrderedMapping) or not isinstance(state, dict):
            raise self.refused("setting the state of something that is no OrderedDict")
        if other := state.keys() - {"_metadata"}:
            raise self.refused(f"setting the attribute {min(other)[:200]!r}")


def _is_size(value: object) -> bool:
    return type(value) is int and value >= 0


# By the names of pickletools; STOP is the loop's own.
_STEPS: Final[Mapping[str, Callable[[_Machine], None]]] = {
    "PROTO": _Machine.protocol,
    "MARK": _Machine.mark,
    "NONE": lambda machine: machine.push(None),
    "NEWTRUE": lambda machine: machine.push(True),
    "NEWFALSE": lambda machine: machine.push(False),
    "BININT1": lambda machine: machine.push(machine.number("<B")),
    "BININT2": lambda machine: machine.push_new(machine.number("<H")),
    "BININT": lambda machine: machine.push_new(machine.number("<i")),
    "LONG1": _Machine.long,
    "BINFLOAT": lambda machine: machine.push_new(struct.unpack(">d", machine.take(8))[0]),
    "BINUNICODE": _Machine.text,
    "EMPTY_TUPLE": lambda machine: machine.push(()),
    "TUPLE1": lambda machine: machine.last(1),
    "TUPLE2": lambda machine: machine.last(2),
    "TUPLE3": lambda machine: machine.last(3),
    "TUPLE": lambda machine: machine.push_new(tuple(machine.since_mark())),
    "EMPTY_LIST": lambda machine: machine.push_new([]),
    "APPEND": lambda machine: machine.extend([machine.stack.pop()]),
    "APPENDS": lambda machine: machine.extend(machine.since_mark()),
    "EMPTY_DICT": lambda machine: machine.push_new({}),
    "SETITEM": _Machine.set_item,
    "SETITEMS": lambda machine: machine.set_items(machine.since_mark()),
    "BINPUT": lambda machine: machine.put(machine.number("<B")),
    "LONG_BINPUT": lambda machine: machine.put(machine.number("<I")),
    "BINGET": lambda machine: machine.push(machine.memo[machine.number("<B")]),
    "LONG_BINGET": lambda machine: machine.push(machine.memo[machine.number("<I")]),
    "GLOBAL": _Machine.find_global,
    "BINPERSID": _Machine.storage,
    "REDUCE": _Machine.apply,
    "BUILD": _Machine.state,
}
