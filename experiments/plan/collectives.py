"""How many bytes a chip sends to others in a compiled program, read from its text: neither XLA's cost analysis nor the traced
program says it, and the analysis counts the body of a loop once."""

import math
import re

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16} | {
    "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64,
}  # fmt: skip
ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")
OPERATION = re.compile(r"(?:ROOT )?%?[\w.-]+ = (.*?[\])}]) ([\w-]+)\((.*)")
CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
CALLERS = {"call", "conditional", "async-start", "fusion", "while"}
# What a chip sends of the result (all-gather, all-reduce, ...) or of the operand (reduce-scatter), in a ring of n chips.
SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}


def sent(text):
    """{opcode: bytes} that one chip sends to others in one run of the program `text` (`Compiled.as_text()`), loops counted as
    often as they run."""
    program, entry = _parse(text)
    totals = {}

    def visit(name, times):
        for shape, kind, rest in program[name]:
            base = kind.removesuffix("-start")
            if base in SENT:
                totals[base] = totals.get(base, 0.0) + times * _sent(kind, shape, rest)
            elif kind in CALLERS:
                turns = times * _trips(program, rest) if kind == "while" else times
                for called in _called(rest):
                    visit(called, turns)

    visit(entry, 1)
    return totals


def _parse(text):
    """({computation: [(the text of the result's shape, opcode, the rest of the line)]}, the entry's name)."""
    program, entry, current = {}, None, None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY ")) and (header := HEADER.match(line.rstrip())):
            current = program.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("  ") and current is not None and (operation := OPERATION.match(line.strip())):
            current.append(operation.groups())
    return program, entry


def _called(rest):
    listed = [name.strip().lstrip("%") for names in BRANCHES.findall(rest) for name in names.split(",")]
    return CALLED.findall(rest) + listed


def _trips(program, rest):
    """How often a while runs: XLA says, or its condition compares a counter from 0 with a constant; 1 where neither is so."""
    known = re.search(r'known_trip_count":\s*\{"n":"(\d+)"', rest)
    if known:
        return int(known[1])
    condition = program[re.search(r"condition=%?([\w.-]+)", rest)[1]]
    bounds = [re.match(r"(\d+)\)", bound) for _, kind, bound in condition if kind == "constant"]
    return max((int(bound[1]) for bound in bounds if bound), default=1)


def _sent(kind, shape, rest):
    """Bytes that a chip sends in one collective. It may have several results; those of `-start` stand behind its operands."""
    base = kind.removesuffix("-start")
    sizes = [_bytes(*array) for array in ARRAY.findall(shape) if array[1]]
    if kind != base and base != "all-reduce":
        sizes = sizes[len(sizes) // 2 :]
    chips = _chips(rest)
    return sum(sizes) * (chips if base == "reduce-scatter" else 1) * SENT[base](chips)


def _chips(rest):
    """Chips in a collective's group, in any of the ways in which XLA writes it."""
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(tiled[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(part.split("=") for part in axes[1].split(","))
        return math.prod(int(sizes[name]) for name in axes[2].split(","))
    return 1


def _bytes(kind, dims):
    return math.prod(map(int, filter(None, dims.split(",")))) * BITS.get(kind, 8 if kind.startswith("f8") else 0) / 8
