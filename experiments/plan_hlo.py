"""What a compiled program does, read from its text: matrix products, bytes to and from memory and between chips, loops counted as
often as they run (XLA's own cost analysis counts a loop's body once).

Letters: N chips in a group.
"""

import functools
import math
import re
from typing import NamedTuple

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16} | {
    "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64,
}  # fmt: skip
ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# What a chip sends of the result (all-gather, all-reduce, ...) or of the operand (reduce-scatter), in a ring of N.
SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}
# They move nothing themselves: names for what others made, or the calls of what is counted apart.
STILL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"} | {
    "after-all", "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done",
}  # fmt: skip
PASSES = {"highest": 6, "high": 3}  # bfloat16 products that a float32 one of this precision takes


class Op(NamedTuple):
    """One instruction: name, the text of its shape, opcode, operands' names, the rest of its line, whether it is the root."""

    name: str
    shape: str
    kind: str
    operands: tuple
    rest: str
    root: bool


class Totals(NamedTuple):
    """What one chip does in one run of the program: bytes to and from its memory, bytes sent to other chips {opcode: bytes}, and
    the operations of its matrix products, as one counts them and in bfloat16 passes (the highest precision takes six)."""

    memory: float
    sent: dict
    flops: float
    passes: float


def totals(text):
    """What the compiled program `text` (`Compiled.as_text()`) does -> Totals."""
    program, sums, sent = parse(text), dict.fromkeys(("memory", "flops", "passes"), 0.0), {}

    def visit(name, times, fused):
        for op in program[name].values():
            flops, passes = _product(program[name], op)
            sums["flops"] += times * flops
            sums["passes"] += times * flops * passes
            sums["memory"] += 0 if fused else times * _traffic(program, name, op)
            base = op.kind.removesuffix("-start")
            if base in SENT:
                sent[base] = sent.get(base, 0.0) + times * _sent(base, op)
            if op.kind == "while":
                visit(_called(op)[0], times * _trips(program, op), fused)
            elif op.kind in ("call", "conditional", "async-start", "fusion"):
                for called in _called(op):
                    visit(called, times, fused or op.kind == "fusion")

    visit(next(name for name in program if name.startswith("ENTRY ")), 1, False)
    return Totals(sent=sent, **sums)


def parse(text):
    """{computation: {instruction: Op}}; the entry's name begins with "ENTRY "."""
    program, current = {}, None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY ")) and line.rstrip().endswith("{"):
            entry = line.startswith("ENTRY ")
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
            current = program.setdefault(f"ENTRY {name}" if entry else name, {})
        elif line.startswith("  ") and current is not None and " = " in line:
            op = _op(line.strip())
            current[op.name] = op
        elif line.startswith("}"):
            current = None
    return program


def _op(line):
    root = line.startswith("ROOT ")
    name, right = line.removeprefix("ROOT ").split(" = ", 1)
    end = _end(right, " ")
    shape, right = right[:end], right[end + 1 :]
    kind, right = right.split("(", 1)
    end = _end("(" + right, None) - 1
    operands = tuple(re.findall(r"%([\w.-]+)", right[:end]))
    rest = right[:end] if kind in ("parameter", "constant") else right[end + 1 :]
    return Op(name.lstrip("%"), shape, kind, operands, rest, root)


def _end(text, stop):
    """Where `stop` first stands outside all brackets; with None, where the first bracket closes."""
    depth = 0
    for i, char in enumerate(text):
        if char == stop and not depth:
            return i
        depth += (char in "({[") - (char in ")}]")
        if stop is None and not depth:
            return i
    return len(text)


def _array_bytes(match, main_memory=False):
    """Bytes of one array in a shape; 0 where it lies in another memory (on chip: S(1)) and only the main one counts."""
    kind, dims, layout = match.groups()
    if main_memory and layout and "S(" in layout:
        return 0
    return math.prod(map(int, filter(None, dims.split(",")))) * BITS.get(kind, 8 if kind.startswith("f8") else 0) / 8


def _bytes(shape):
    """Bytes that a shape takes in main memory."""
    return sum(_array_bytes(match, True) for match in ARRAY.finditer(shape))


def _called(op):
    found = CALLED.findall(op.rest)
    for names in BRANCHES.findall(op.rest):
        found += [name.strip().lstrip("%") for name in names.split(",")]
    return found


def _trips(program, op):
    """How often a while runs: XLA says, or its condition compares a counter from 0 with a constant; 1 where neither is so."""
    known = re.search(r'known_trip_count":\s*\{"n":"(\d+)"', op.rest)
    if known:
        return int(known.group(1))
    condition = program[re.search(r"condition=%?([\w.-]+)", op.rest).group(1)]
    bounds = [int(o.rest) for o in condition.values() if o.kind == "constant" and re.fullmatch(r"\d+", o.rest)]
    return max(bounds, default=1)


def _group(rest):
    """Chips in a collective's group."""
    tiled = re.search(r"replica_groups=\[\d+,(\d+)\]", rest)
    if tiled:
        return int(tiled.group(1))
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    return len(listed.group(1).split(",")) if listed else 1


def _traffic(program, name, op):
    """Bytes that one instruction reads and writes."""
    allocates = op.kind == "custom-call" and not op.operands
    if op.kind in STILL or op.kind.endswith("-done") or allocates:
        return 0
    here = program[name]
    shapes = [here[operand].shape for operand in op.operands if operand in here]
    if op.kind.endswith("-start"):  # its shape repeats the operand's
        return sum(map(_bytes, shapes)) * 2
    if op.kind in ("dynamic-slice", "slice", "gather"):
        return 2 * _bytes(op.shape)
    if op.kind == "dynamic-update-slice":
        return 2 * _bytes(shapes[1])
    if op.kind != "fusion":
        return _bytes(op.shape) + sum(map(_bytes, shapes))
    called = _called(op)[0]
    read = sum(min(_bytes(shape), _read(program, called, i)) for i, shape in enumerate(shapes))
    return read + min(_bytes(op.shape), _written(program, called))


def _read(program, name, index):
    """Bytes of its parameter `index` that a fused computation looks at: a slice where it takes slices alone."""
    here = program[name]
    mine = next((op for op in here.values() if op.kind == "parameter" and op.rest == str(index)), None)
    if mine is None:
        return 0
    return _looked_at(program, here, mine)


def _looked_at(program, here, value):
    total = 0
    for op in here.values():
        for place in (i for i, operand in enumerate(op.operands) if operand == value.name):
            if op.kind in ("dynamic-slice", "slice", "gather") and place == 0:
                total += _plain_bytes(op.shape)
            elif op.kind == "dynamic-update-slice" and place == 0:
                continue
            elif op.kind == "bitcast":
                total += _looked_at(program, here, op)
            elif op.kind == "fusion":
                total += _read(program, _called(op)[0], place)
            else:
                return math.inf
    return total


def _plain_bytes(shape):
    return sum(map(_array_bytes, ARRAY.finditer(shape)))


def _written(program, name):
    """Bytes that a fused computation writes: an update where it writes into what it was given."""
    here = program[name]
    root = next(op for op in here.values() if op.root)
    outputs = [here[operand] for operand in root.operands] if root.kind == "tuple" else [root]
    return sum(_output(program, here, op) for op in outputs)


def _output(program, here, op):
    shape = op.shape
    while op.kind in ("bitcast", "copy", "convert") and op.operands[0] in here:
        op = here[op.operands[0]]
    if op.kind == "dynamic-update-slice":
        return _bytes(here[op.operands[1]].shape)
    return min(_bytes(shape), _written(program, _called(op)[0])) if op.kind == "fusion" else _bytes(shape)


def _sent(base, op):
    """Bytes that a chip sends in one collective."""
    size = _group(op.rest)
    largest = max(map(_array_bytes, ARRAY.finditer(op.shape)), default=0)
    return largest * (size if base == "reduce-scatter" else 1) * SENT[base](size)


def _product(here, op):
    """(operations, bfloat16 passes) of a matrix product, which on a TPU is called a convolution; (0, 0) of all else."""
    if op.kind not in ("convolution", "dot"):
        return 0, 0
    left, right, out = (_dims(shape) for shape in (*(here[name].shape for name in op.operands), op.shape))
    if op.kind == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest).group(1)
        count = math.prod(out) * math.prod(left[int(i)] for i in contracted.split(",") if i)
    else:
        count = _convolved(op.rest, left, right, out)
    precision = re.search(r"operand_precision=\{(\w+)", op.rest)
    wide = all(here[name].shape.startswith("f32") for name in op.operands)
    return 2 * count, PASSES.get(precision.group(1), 1) if precision and wide else 1


def _convolved(rest, left, right, out):
    """Multiplications of a convolution: padding and the gaps of a dilated side meet nothing."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    sides = [
        dict(zip(names, dims, strict=True)) for names, dims in zip(labels.groups(), (left, right, out), strict=True)
    ]
    lhs, rhs, result = sides
    spatial = [name for name in lhs if name.isdigit()]
    options = dict(re.findall(r"(size|stride|pad|lhs_dilate|rhs_dilate)=([\dx_-]+)", rest))
    count = rhs["i"] * rhs["o"] * lhs["b"]
    for i, name in enumerate(spatial):
        stride, left_gap, right_gap = (
            int(options[key].split("x")[i]) if key in options else 1 for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(options["pad"].split("x")[i].split("_")[0]) if "pad" in options else 0
        count *= _meetings(rhs[name], result[name], lhs[name], stride, low, left_gap, right_gap)
    groups = re.search(r"batch_group_count=(\d+)", rest)
    return count // (int(groups.group(1)) if groups else 1)


@functools.lru_cache(maxsize=4096)
def _meetings(window, outputs, inputs, stride, low, left_gap, right_gap):
    """How many pairs of a place in the window and an output see an input, along one axis."""
    places = (o * stride - low + w * right_gap for w in range(window) for o in range(outputs))
    return sum(place % left_gap == 0 and 0 <= place // left_gap < inputs for place in places)


def _dims(shape):
    return [int(size) for size in ARRAY.search(shape).group(2).split(",") if size]
