"""Machine code as nvdisasm prints it (`nvdisasm -c`): instructions, basic blocks, loops, and the way through a loop.

A loop is a natural loop: its header dominates the block that jumps back to it. A block may be in several loops; the
innermost is the smallest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_FUNCTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)")
_LABEL = re.compile(r"^\s*([.$\w]+):\s*$")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\(([^)]+)\)")
_PREDICATE = re.compile(r"^!?U?P\d")
_ENDS = {"EXIT", "RET"}


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: str = ""
    predicate: str = ""  # of "@!P0 BRA" it is "!P0"; the instruction takes its slot whether it holds or not

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> str | None:
        found = _TARGET.search(self.operands)
        return found and found[1]

    @property
    def conditional(self) -> bool:
        """Of a jump: whether it may go on instead. "BRA P1, `(.L)" and "BRA.U UP0, `(.L)" have a second predicate."""
        second = _PREDICATE.match(self.operands) is not None or self.opcode.startswith("BRA.DIV")
        return second or self.predicate not in ("", "PT", "UPT")


@dataclass
class Block:
    """Instructions of which all are executed if the first is."""

    number: int
    labels: list[str] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Loop:
    header: int
    blocks: frozenset[int]

    def __lt__(self, other: Loop) -> bool:
        """Whether it is inside the other."""
        return self.blocks < other.blocks


def functions(text: str) -> dict[str, list[Block]]:
    """The basic blocks of every function, by its symbol; its subroutines, for slow divisions, are among them."""
    found: dict[str, list[Block]] = {}
    blocks: list[Block] = []
    fresh = True
    for line in text.splitlines():
        if section := _FUNCTION.match(line):
            blocks = found[section[1]] = []
            fresh = True
        elif label := _LABEL.match(line):
            if fresh and blocks and not blocks[-1].instructions:
                blocks[-1].labels.append(label[1])
            else:
                blocks.append(Block(len(blocks), [label[1]]))
            fresh = True
        elif instruction := _INSTRUCTION.match(line):
            if not blocks or (fresh and blocks[-1].instructions):
                blocks.append(Block(len(blocks)))
            predicate, opcode, operands = instruction.groups("")
            blocks[-1].instructions.append(Instruction(opcode, operands, predicate))
            fresh = blocks[-1].instructions[-1].name in {"BRA", "BRX", "JMP", "JMX", "BSYNC", *_ENDS}
    for name, those in found.items():
        _connect(name, those)
    return found


def _connect(name: str, blocks: list[Block]) -> None:
    """Fills in successors. BSYNC goes where the last BSSY of that barrier said."""
    at = {label: block.number for block in blocks for label in block.labels}
    ends: dict[int, str] = {}  # of blocks that end in BSYNC, the barrier
    for block in blocks:
        last = block.instructions[-1] if block.instructions else Instruction("NOP")
        following = [block.number + 1] if block.number + 1 < len(blocks) else []
        if last.name in ("BRX", "JMX"):
            raise ValueError(f"{name}: expected jumps to labels, got {last.opcode}, which goes where a register says")
        if last.name in ("BRA", "JMP"):
            jump = [at[last.target]] if last.target in at else []
            block.successors = jump + (following if last.conditional else [])
        elif last.name in _ENDS:
            block.successors = following if last.conditional else []
        else:
            block.successors = following
            if last.name == "BSYNC":
                ends[block.number] = last.operands
    meeting: dict[str, set[int]] = {}
    for block in blocks:
        for one in block.instructions:
            if one.name == "BSSY" and one.target in at:
                meeting.setdefault(one.operands.partition(",")[0], set()).add(at[one.target])
    for number, barrier in ends.items():
        after = {target for target in meeting.get(barrier, ()) if target > number}
        if after:
            blocks[number].successors = [min(after)]


def loops(blocks: list[Block]) -> list[Loop]:
    """The natural loops of a function, the smallest first; back edges to one header make one loop."""
    before: dict[int, set[int]] = {block.number: set() for block in blocks}
    for block in blocks:
        for successor in block.successors:
            before[successor].add(block.number)
    bodies: dict[int, set[int]] = {}
    dominators = _dominators(blocks, before)
    for block in blocks:
        for header in block.successors:
            if header in dominators[block.number]:
                body = bodies.setdefault(header, {header})
                waiting = [block.number]
                while waiting:
                    number = waiting.pop()
                    if number not in body:
                        body.add(number)
                        waiting.extend(before[number])
    found = [Loop(header, frozenset(body)) for header, body in bodies.items()]
    return sorted(found, key=lambda loop: (len(loop.blocks), loop.header))


def _dominators(blocks: list[Block], before: dict[int, set[int]]) -> dict[int, set[int]]:
    """Of each block that is reached from the first, those that every way to it goes through."""
    reached, waiting = set(), [0]
    while waiting:
        number = waiting.pop()
        if number not in reached:
            reached.add(number)
            waiting.extend(blocks[number].successors)
    found = {block.number: set(reached) if block.number in reached else set() for block in blocks}
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for number in sorted(reached - {0}):
            now = set.intersection(*(found[other] for other in before[number] & reached)) | {number}
            changed |= now != found[number]
            found[number] = now
    return found


def _of(block: Block, name: str) -> int:
    return sum(one.opcode.startswith(name) for one in block.instructions)


def way(blocks: list[Block], loop: Loop, all_loops: list[Loop], via: dict[str, int]) -> list[Instruction] | None:
    """The shortest trip through a loop, from its header to a jump back, that executes what `via` says.

    via: of opcodes that begin so, how many at least, or 0 for none. None where no trip does without an inner loop.
    """
    barred = {number for other in all_loops if other < loop for number in other.blocks}
    barred |= {n for n in loop.blocks for name, least in via.items() if least == 0 and _of(blocks[n], name)}
    counts_type = tuple[int, ...]
    found: dict[int, dict[counts_type, tuple[int, ...]]] = {}

    def length(numbers: tuple[int, ...]) -> int:
        return sum(len(blocks[number].instructions) for number in numbers)

    def from_here(number: int) -> dict[counts_type, tuple[int, ...]]:
        """The shortest ways from a block to the end of a trip, by how much of `via` they execute."""
        if number not in found:
            own = [_of(blocks[number], name) for name in via]
            ways: dict[counts_type, tuple[int, ...]] = {}
            for successor in blocks[number].successors:
                rest: dict[counts_type, tuple[int, ...]] = {}
                if successor == loop.header:
                    rest = {(0,) * len(via): ()}
                elif successor in loop.blocks - barred:
                    rest = from_here(successor)
                for counts, numbers in rest.items():
                    now = tuple(min(a + b, most) for a, b, most in zip(own, counts, via.values(), strict=True))
                    if now not in ways or length(numbers) + length((number,)) < length(ways[now]):
                        ways[now] = (number, *numbers)
            found[number] = ways
        return found[number]

    best = None if loop.header in barred else from_here(loop.header).get(tuple(via.values()))
    return None if best is None else [one for number in best for one in blocks[number].instructions]
