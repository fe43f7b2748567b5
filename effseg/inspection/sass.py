"""What a kernel's machine code says: how its blocks follow each other, and what is executed where nothing is
masked. Reads nvdisasm's text; pure Python."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise

MMA = re.compile(r"(HGMMA|HMMA|UTC[A-Z]*MMA)\b")
GLOBAL = re.compile(r"(LDGSTS|LDG|STG)\b(\S*)")
LOCAL = re.compile(r"(LDL|STL)\b")
WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
"""Bytes that a thread moves, by the instruction's suffix; 4 without one."""


@dataclass(frozen=True)
class Instruction:
    """guard: its predicate ("@!P0") or nothing; text: the rest."""

    guard: str
    text: str

    @property
    def target(self) -> str:
        """The label that a branch goes to, or nothing."""
        match = re.match(r"(?:BRA|JMP)\b.*`\(([^)\s]+)\)", self.text)
        return match.group(1) if match else ""

    @property
    def falls_through(self) -> bool:
        """Whether some thread goes on with the next instruction."""
        if self.guard:
            return True
        if self.target:
            return re.match(r"\S+\s+`", self.text) is None
        return re.match(r"(EXIT|RET|BRX|JMX|KILL)\b", self.text) is None

    @property
    def mma(self) -> str:
        """HGMMA, HMMA, UTCHMMA ... or nothing."""
        match = MMA.match(self.text)
        return match.group(1) if match else ""

    @property
    def access(self) -> tuple[str, int]:
        """("load" or "store", bytes a thread) of an access to global memory, ("", 0) of anything else."""
        match = GLOBAL.match(self.text)
        if not match:
            return "", 0
        width = next((WIDTHS[s] for s in match.group(2).split(".") if s in WIDTHS), 4)
        return "store" if match.group(1) == "STG" else "load", width


@dataclass(frozen=True)
class Path:
    """One way through blocks of code. work: what it is for, as the caller counts; stored: bytes a thread;
    turns: of a loop that it holds, more than one where the compiler has unrolled it."""

    work: int = 0
    stored: int = 0
    instructions: int = 0
    blocks: tuple[int, ...] = ()
    turns: int = 1

    def __add__(self, other: Path) -> Path:
        return Path(
            self.work + other.work,
            self.stored + other.stored,
            self.instructions + other.instructions,
            self.blocks + other.blocks,
        )

    @property
    def rank(self) -> tuple[int, int, int]:
        """The interior is the way that works and stores most; of those the shortest: masks cost."""
        return self.work, self.stored, -self.instructions


@dataclass(frozen=True)
class Code:
    """The control flow of one kernel. blocks: ranges of instructions without a branch or a label inside."""

    instructions: tuple[Instruction, ...]
    blocks: tuple[range, ...]
    successors: tuple[tuple[int, ...], ...]
    loops: dict[int, frozenset[int]] = field(default_factory=dict)

    def count(self, test: Callable[[Instruction], bool], blocks: Iterable[int] | None = None) -> int:
        return sum(
            test(self.instructions[i])
            for b in (range(len(self.blocks)) if blocks is None else blocks)
            for i in self.blocks[b]
        )

    def loads(self, blocks: Iterable[int]) -> Counter[int]:
        """Loads from global memory by their bytes a thread."""
        found = (self.instructions[i].access for b in blocks for i in self.blocks[b])
        return Counter(width for kind, width in found if kind == "load")

    @property
    def spills(self) -> int:
        """Instructions that move registers to and from local memory."""
        return self.count(lambda i: LOCAL.match(i.text) is not None)


def parse(text: str) -> Code:
    """Blocks, edges and natural loops of nvdisasm -c's text of one kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if match := re.match(r"\s*(\.L_\S+):", line):
            labels[match.group(1)] = len(instructions)
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?(.*?)\s*;?\s*$", line):
            instructions.append(Instruction((match.group(1) or "").strip(), match.group(2)))
    n = len(instructions)
    ends = {
        i + 1
        for i, instruction in enumerate(instructions)
        if instruction.target or not instruction.falls_through
    }
    cuts = sorted({0, n} | ends | {i for i in labels.values() if i < n})
    blocks = tuple(range(a, b) for a, b in pairwise(cuts))
    block_at = {block.start: i for i, block in enumerate(blocks)}
    successors = []
    for i, block in enumerate(blocks):
        last = instructions[block[-1]]
        follow = [block_at[labels[last.target]]] if labels.get(last.target, n) < n else []
        if last.falls_through and i + 1 < len(blocks):
            follow.append(i + 1)
        successors.append(tuple(follow))
    code = Code(tuple(instructions), blocks, tuple(successors))
    return Code(code.instructions, code.blocks, code.successors, natural_loops(code.successors))


def natural_loops(successors: tuple[tuple[int, ...], ...]) -> dict[int, frozenset[int]]:
    """Header -> blocks of each loop: where an edge's head dominates its tail, all that lies between."""
    if not successors:
        return {}
    order = reverse_postorder(successors)
    predecessors: dict[int, list[int]] = {b: [] for b in order}
    for b in order:
        for follow in successors[b]:
            predecessors[follow].append(b)
    everything = frozenset(order)
    dominators = {b: everything for b in order}
    dominators[0] = frozenset({0})
    changed = True
    while changed:
        changed = False
        for b in order[1:]:
            new = frozenset.intersection(*(dominators[p] for p in predecessors[b])) | {b}
            changed |= new != dominators[b]
            dominators[b] = new
    loops: dict[int, frozenset[int]] = {}
    for tail in order:
        for header in successors[tail]:
            if header in dominators[tail]:
                body, stack = {header, tail}, [tail] if tail != header else []
                while stack:
                    for p in predecessors[stack.pop()]:
                        if p not in body:
                            body.add(p)
                            stack.append(p)
                loops[header] = loops.get(header, frozenset()) | body
    return loops


def reverse_postorder(successors: tuple[tuple[int, ...], ...]) -> list[int]:
    """Blocks that the first reaches, each before what follows it but for edges that close loops."""
    seen, postorder = {0}, []
    stack = [(0, iter(successors[0]))]
    while stack:
        block, rest = stack[-1]
        follow = next((b for b in rest if b not in seen), None)
        if follow is None:
            postorder.append(block)
            stack.pop()
        else:
            seen.add(follow)
            stack.append((follow, iter(successors[follow])))
    return postorder[::-1]


def interior(
    code: Code,
    region: frozenset[int],
    header: int,
    work: Callable[[Instruction], int],
    through: int | None = None,
) -> Path:
    """The interior way once through a region (a loop's body, or all blocks), from its header.

    Loops inside the region count as one block of no cost, for how often they turn is not the code's to say.
    `through`: the header of one of them that the way must meet.
    """
    inside = {h: body for h, body in code.loops.items() if body < region}
    outermost = {h: b for h, b in inside.items() if not any(b < other for other in inside.values())}
    owner = {b: h for h, body in outermost.items() for b in body}
    steps: dict[int, set[int]] = {}
    for b in region:
        steps.setdefault(owner.get(b, b), set()).update(
            owner.get(f, f)
            for f in code.successors[b]
            if f in region and f != header and owner.get(f, f) != owner.get(b, b)
        )
    first = owner.get(header, header)
    best: dict[int, Path] = {}
    for b in reversed([b for b in reverse_postorder(code.successors) if b in steps]):
        own = Path(blocks=(b,)) if b in outermost else cost(code, b, work)
        ways = [best[f] for f in steps[b] if f in best and f != first]
        best[b] = own + max(ways, key=lambda way: (through in way.blocks, *way.rank), default=Path())
    way = best[first]
    return replace(way, blocks=tuple(b for b in way.blocks if b not in outermost))


def cost(code: Code, block: int, work: Callable[[Instruction], int]) -> Path:
    instructions = [code.instructions[i] for i in code.blocks[block]]
    stored = sum(width for kind, width in (i.access for i in instructions) if kind == "store")
    return Path(sum(map(work, instructions)), stored, len(instructions), (block,))


def main_and_around(code: Code, work: Callable[[Instruction], int]) -> tuple[Path, Path]:
    """The interior way once through the loop that works (the cheapest of several), and once through what
    encloses it, a loop or the whole kernel, without it; all code and an empty path where no loop works.

    The interior turns of a loop may have been unrolled while those with masks are still a loop: the first
    path is then all of them.
    """
    everything = frozenset(reverse_postorder(code.successors))
    ways = {h: interior(code, body, h, work) for h, body in code.loops.items()}
    working = [h for h, way in ways.items() if way.work]
    if not working:
        return interior(code, everything, 0, work), Path()
    main = min(working, key=lambda h: ways[h].instructions / ways[h].work)
    enclosing = [(body, h) for h, body in code.loops.items() if code.loops[main] < body]
    body, header = min(enclosing, key=lambda found: len(found[0]), default=(everything, 0))
    around = interior(code, body, header, work, through=main)
    beside = interior(code, body, header, work)
    costs = [cost(code, b, work) for b in beside.blocks]
    unrolled = sum((block for block in costs if block.work), Path())
    turns, rest = divmod(unrolled.work, ways[main].work)
    # What has been peeled off the loop works on the way through it, too.
    if turns > 1 and not rest and not around.work and unrolled.instructions < turns * ways[main].instructions:
        return replace(unrolled, turns=turns), sum((block for block in costs if not block.work), Path())
    return ways[main], around
