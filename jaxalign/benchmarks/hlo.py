"""What one device of a partitioned program does, read from its HLO text: what it sends, what it multiplies.

The text is that of the module behind XLA's SPMD partitioner and before the passes of a backend, so that types and
collectives are what every backend is given: bf16 stays bf16 (the CPU widens it later) and nothing is combined yet.
Loops count as often as they run; a loop that holds work and whose count cannot be told is an error, not a guess.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "token": 0, "opaque": 0}


class Instruction(NamedTuple):
    """One line of HLO."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes


class Collective(NamedTuple):
    """Collectives of one kind over the same devices; `size` in bytes of one of them.

    size: of the whole result (all-gather), of a device's operand (the others).
    """

    kind: str
    axes: tuple[str, ...]  # of the mesh, along which the devices differ
    size: int
    group: tuple[int, ...]  # the devices of the first group; the other groups lie alike
    times: int  # a step

    @property
    def wire(self) -> float:
        """Bytes that a device sends in a step, by the algorithm that sends the least (a ring)."""
        n = len(self.group)
        share = 1.0 if self.kind == "collective-permute" else (n - 1) / n * (2 if self.kind == "all-reduce" else 1)
        return share * self.size * self.times


class Work(NamedTuple):
    """What one device does in a step: flops of matrix products and convolutions, and its collectives."""

    flops: int
    collectives: list[Collective]


Computation = dict[str, Instruction]  # by name, in order


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """(computations by name, the entry's name) of a module's text."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if not line.startswith(" "):
            if line.endswith("{") and " -> " in line:
                name = line.removeprefix("ENTRY ").split(" ", 1)[0]
                entry = name if line.startswith("ENTRY") else entry
                current = computations[name] = {}
        elif current is not None and " = " in line:
            name, body = line.strip().split(" = ", 1)
            is_root, name = name.startswith("ROOT "), name.removeprefix("ROOT ")
            kind, body = _until(body, 0) if body.startswith("(") else body.split(" ", 1)
            opcode, body = body.lstrip().split("(", 1)
            inside, rest = _until("(" + body, 0)
            inside = re.sub(r"/\*.*?\*/", "", inside[1:-1])
            operands = tuple(part.strip().split(" ")[-1] for part in _split(inside))
            current[name] = Instruction(name, kind, opcode, operands, rest)
            if is_root:
                current["ROOT"] = current[name]
    return computations, entry


def _until(text: str, start: int) -> tuple[str, str]:
    """The bracket that opens at `start`, and what follows it."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] in "({[") - (text[at] in ")}]")
        if depth == 0:
            return text[start : at + 1], text[at + 1 :]
    raise ValueError(f"HLO: no end of the bracket in {text[:80]!r}")


def _split(text: str) -> list[str]:
    """Parts between the commas that stand in no bracket."""
    parts, depth, last = [], 0, 0
    for at, char in enumerate(text):
        depth += (char in "({[") - (char in ")}]")
        if char == "," and depth == 0:
            parts.append(text[last:at])
            last = at + 1
    return [*parts, text[last:]] if text.strip() else []


def _shapes(kind: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(d, tuple(map(int, filter(None, s.split(","))))) for d, s in re.findall(r"(\w+)\[([\d,]*)\]", kind)]


def num_bytes(kind: str) -> int:
    """Bytes of an HLO type, of a tuple's parts together."""

    def bits(dtype: str) -> int:  # bf16, f8e4m3fn, s4, ...
        return _BITS[dtype] if dtype in _BITS else int(re.search(r"\d+", dtype)[0])

    return sum(math.ceil(math.prod(shape) * bits(dtype) / 8) for dtype, shape in _shapes(kind))


def work(text: str, mesh: Mapping[str, int]) -> Work:
    """What one device does, for a mesh of these axes (sizes by name, in order). Raises ValueError; see above."""
    computations, entry = parse(text)
    done: dict[str, Work] = {}

    def of(name: str) -> Work:
        if name not in done:
            flops, found = 0, []
            body = {k: i for k, i in computations[name].items() if k != "ROOT"}
            for i in body.values():
                times, called = 1, []
                if i.opcode == "while":
                    called = [_attribute(i, "body")]
                    inner = of(called[0])
                    times = _trip_count(i, body, computations) if inner.flops or inner.collectives else 1
                elif i.opcode == "conditional":  # all branches: at least what one of them does
                    called = re.findall(r"%[\w.\-]+", re.sub(r".*(branch_computations|true_computation)=", "", i.rest))
                    called = [c for c in called if c in computations]
                elif i.opcode in ("call", "fusion", "async-start"):
                    called = [c for key in ("to_apply", "calls") if (c := _attribute(i, key))]
                elif i.opcode in ("dot", "convolution"):
                    flops += _flops(i, body)
                elif (kind := i.opcode.removesuffix("-start")) in KINDS:
                    found.append(_collective(kind, i, body, mesh))
                for inner in map(of, called):
                    flops += inner.flops * times
                    found += [c._replace(times=c.times * times) for c in inner.collectives]
            done[name] = Work(flops, found)
        return done[name]

    return of(entry)


def _attribute(i: Instruction, key: str) -> str | None:
    found = re.search(rf"\b{key}=(%[\w.\-]+)", i.rest)
    return found and found[1]


def _flops(i: Instruction, body: Computation) -> int:
    (_, out), *_ = _shapes(i.type)
    (_, left), *_ = _shapes(body[i.operands[0]].type)
    (_, right), *_ = _shapes(body[i.operands[1]].type)
    if i.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
        axes = map(int, filter(None, contracted[1].split(","))) if contracted else ()
        return 2 * math.prod(out) * math.prod(left[axis] for axis in axes)
    kernel = re.search(r"dim_labels=\w+_(\w+)->", i.rest)[1]
    return 2 * math.prod(out) * math.prod(right) // right[kernel.index("o")]


# ---- loops ------------------------------------------------------------------------------------------------------


def _trip_count(loop: Instruction, body: Computation, computations: Mapping[str, Computation]) -> int:
    """How often a loop runs: as XLA says, or for a counter that goes from 0 in steps of 1 to a constant."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(known[1])
    condition, inside = (computations[_attribute(loop, key)] for key in ("condition", "body"))
    test = condition["ROOT"]
    counter, limit = (_behind_copies(name, condition) for name in (*test.operands, "", "")[:2])
    if test.opcode == "compare" and "direction=LT" in test.rest and counter and counter.opcode == "get-tuple-element":
        index = int(re.search(r"index=(\d+)", counter.rest)[1])
        start = _element(body[loop.operands[0]], index, body)
        step = _element(inside["ROOT"], index, inside)
        if limit and limit.opcode == "constant" and _constant(start) == 0 and _adds_one(step, index, inside):
            return int(limit.operands[0])
    raise ValueError(f"HLO: how often does {loop.name} run? Its condition is {test.opcode}{test.operands}{test.rest}")


def _behind_copies(name: str, body: Computation) -> Instruction | None:
    i = body.get(name)
    while i is not None and i.opcode in ("copy", "bitcast"):
        i = body.get(i.operands[0])
    return i


def _element(i: Instruction, index: int, body: Computation) -> Instruction | None:
    return _behind_copies(i.operands[index], body) if i.opcode == "tuple" else None


def _constant(i: Instruction | None) -> int | None:
    return int(i.operands[0]) if i is not None and i.opcode == "constant" else None


def _adds_one(i: Instruction | None, index: int, body: Computation) -> bool:
    if i is None or i.opcode != "add":
        return False
    terms = [_behind_copies(name, body) for name in i.operands]
    counter = [t for t in terms if t and t.opcode == "get-tuple-element" and f"index={index}" in t.rest]
    return len(counter) == 1 and 1 in map(_constant, terms)


# ---- collectives --------------------------------------------------------------------------------------------------


def _collective(kind: str, i: Instruction, body: Computation, mesh: Mapping[str, int]) -> Collective:
    size = sum(num_bytes(body[name].type) for name in i.operands)
    if kind == "collective-permute":
        pairs = [tuple(map(int, p.split(","))) for p in re.findall(r"\{(\d+,\d+)\}", i.rest.split("}}")[0] + "}")]
        moved = [pair for pair in pairs if pair[0] != pair[1]] or pairs[:1]
        return Collective(kind, axes_of(moved, mesh), size * len(moved) // math.prod(mesh.values()), moved[0], 1)
    groups = replica_groups(i.rest, math.prod(mesh.values()))
    n = len(groups[0])
    if kind == "all-gather":
        size *= n
    if kind == "all-reduce":
        # Where each device goes on with its own piece only, GPUs and TPUs reduce and scatter in one.
        users = [u for u in body.values() if i.name in u.operands]
        if users and all(u.opcode == "dynamic-slice" and num_bytes(u.type) * n == size for u in users):
            kind = "reduce-scatter"
    return Collective(kind, axes_of(groups, mesh), size, tuple(groups[0]), 1)


def axes_of(groups: Sequence[Sequence[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of the mesh along which the devices of a group differ."""
    varying = set()
    for group in groups:
        for axis, along in zip(mesh, np.unravel_index(np.asarray(group), tuple(mesh.values())), strict=True):
            varying |= {axis} if len(set(along.tolist())) > 1 else set()
    return tuple(axis for axis in mesh if axis in varying)


def replica_groups(attributes: str, devices: int) -> list[list[int]]:
    """The groups of devices of a collective, in any of the forms in which HLO writes them."""
    text = attributes.split("replica_groups=", 1)[1]
    if text.startswith("{"):  # {{0,1},{2,3}}; {}: all
        inside = _until(text, 0)[0]
        listed = [[int(d) for d in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", inside[1:-1])]
        return listed or [list(range(devices))]
    if text.startswith("["):  # [groups,devices]<=[dims]T(order)
        shape, source = re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text).groups()
        return _iota(source).reshape(_ints(shape)).tolist()
    if found := re.match(r"mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}", text):
        # axes with names of their own, perhaps over permuted devices; 'a':(p)s is the part of size s of axis 'a'
        # that has a part of size p before it
        axes = [(name, int(size)) for name, size in re.findall(r"('[^']+')=(\d+)", found[1])]
        ids = np.arange(devices) if not found[2] else _iota(found[2]) if "[" in found[2] else np.array(_ints(found[2]))
        parts = {name: [size] for name, size in axes}
        chosen = re.findall(r"('[^']+')(?::\((\d+)\)(\d+))?", found[3])
        wanted = []
        for name, before, size in chosen:
            if size:
                whole = dict(axes)[name]
                parts[name] = [int(before), int(size), whole // (int(before) * int(size))]
            wanted.append((name, 1 if size else 0))
        order = [(name, k) for name, _ in axes for k in range(len(parts[name]))]
        ids = ids.reshape([parts[name][k] for name, k in order])
        last = [order.index(axis) for axis in wanted]
        first = [k for k in range(len(order)) if k not in last]
        count = math.prod(ids.shape[k] for k in last)
        return ids.transpose(first + last).reshape(-1, count).tolist()
    raise ValueError(f"HLO: replica groups of an unknown form: {text[:80]}")


def _ints(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def _iota(text: str) -> np.ndarray:
    """Device numbers in the order that [dims]T(order) says."""
    dims, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    ids = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return (ids.transpose(_ints(order)) if order else ids).reshape(-1)
