"""What the main loop of a compiled kernel does, read from its assembly text (PTX or amdgcn)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Dialect:
    """How one assembly language is written; patterns match an instruction without its predicate.

    copies: (pattern, width in bytes) of loads from global memory into a tile; where the width is None, the
    pattern's group holds it. scalar: loads of at most 16 bits.
    matrix: by name, what multiplies tiles.
    """

    label: re.Pattern[str]
    jump: re.Pattern[str]
    branch: re.Pattern[str]
    end: re.Pattern[str]
    comment: str
    copies: tuple[tuple[re.Pattern[str], int | None], ...]
    scalar: re.Pattern[str]
    matrix: dict[str, re.Pattern[str]]


PTX = Dialect(
    # Inline assembly has labels of its own, visible only inside its braces: not blocks.
    label=re.compile(r"(\$L__BB\w+):"),
    jump=re.compile(r"bra(?:\.uni)?\s+(\$L__BB\w+)"),
    branch=re.compile(r"@!?%\w+\s+bra(?:\.uni)?\s+(\$L__BB\w+)"),
    end=re.compile(r"ret|exit|trap"),
    comment="//",
    copies=((re.compile(r"cp\.async\.c[ag]\.shared\.global\S*\s*\[[^\]]*\]\s*,\s*\[[^\]]*\]\s*,\s*(\w+)"), None),),
    scalar=re.compile(r"ld\.global(?:\.(?!v\d)\w+)*\.[bfsu](?:8|16)\b|ld\.global(?:\.(?!v\d)\w+)*\.bf16\b"),
    matrix={
        "wgmma": re.compile(r"wgmma\.mma_async"),
        "mma.sync": re.compile(r"mma\.sync"),
        "tcgen05": re.compile(r"tcgen05\.mma\."),
    },
)
AMDGCN = Dialect(
    label=re.compile(r"(\.LBB\w+):"),
    jump=re.compile(r"s_branch\s+(\.LBB\w+)"),
    branch=re.compile(r"s_cbranch_\w+\s+(\.LBB\w+)"),
    end=re.compile(r"s_endpgm"),
    comment=";",
    copies=(
        (re.compile(r"(?:global|buffer)_load_dwordx4"), 16),
        (re.compile(r"(?:global|buffer)_load_dwordx3"), 12),
        (re.compile(r"(?:global|buffer)_load_dwordx2"), 8),
        (re.compile(r"(?:global|buffer)_load_dword\b"), 4),
    ),
    scalar=re.compile(r"(?:global|buffer)_load_[us](?:short|byte)|(?:global|buffer)_load_short"),
    matrix={"mfma": re.compile(r"v_mfma")},
)


@dataclass
class Block:
    """Instructions that run one after the other; follow: the positions of the blocks that may come next."""

    instructions: list[str] = field(default_factory=list)
    follow: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Loop:
    """Counts of one loop, in instructions of one thread. matrix: by name, only those that occur.

    Where no loop has the matrix instructions, of the whole kernel.
    """

    instructions: int
    copies16: int
    copies_narrow: int
    scalar_loads: int
    matrix: dict[str, int]


def main_loop(text: str, dialect: Dialect) -> Loop | None:
    """The loop with most matrix instructions or, where the kernel has none, the longest; None without loops.

    A loop of few steps may be unrolled: if no loop has the matrix instructions, all of the kernel counts.
    """
    graph = blocks(text, dialect)
    counted = [_count(loop, dialect) for loop in loops(graph)]
    if not any(loop.matrix for loop in counted) and (everything := _count(graph, dialect)).matrix:
        return everything
    return max(counted, key=lambda loop: (sum(loop.matrix.values()), loop.instructions), default=None)


def blocks(text: str, dialect: Dialect) -> list[Block]:
    """The basic blocks of the function in `text`, in their order."""
    found = [Block()]
    position: dict[str, int] = {}
    for instruction in _instructions(text, dialect):
        label = dialect.label.match(instruction)
        if label:
            found.append(Block())
            position[label[1]] = len(found) - 1
        else:
            found[-1].instructions.append(instruction)
            if any(pattern.match(instruction) for pattern in (dialect.jump, dialect.branch, dialect.end)):
                found.append(Block())
    for at, block in enumerate(found):
        last = block.instructions[-1] if block.instructions else ""
        jump = dialect.jump.match(last)
        if target := jump or dialect.branch.match(last):
            block.follow.add(position[target[1]])
        if not jump and not dialect.end.match(last) and at + 1 < len(found):
            block.follow.add(at + 1)
    return found


def loops(graph: list[Block]) -> list[list[Block]]:
    """Sets of blocks that can all reach each other: an inner loop counts to its outer one."""
    reach = [_reachable(graph, at) for at in range(len(graph))]
    members = {at: frozenset(to for to in reach[at] if at in reach[to]) for at in range(len(graph)) if at in reach[at]}
    return [[graph[at] for at in sorted(loop)] for loop in dict.fromkeys(members.values())]


def _reachable(graph: list[Block], start: int) -> set[int]:
    """Positions that a path of at least one step from `start` leads to."""
    seen: set[int] = set()
    pending = list(graph[start].follow)
    while pending:
        at = pending.pop()
        if at not in seen:
            seen.add(at)
            pending.extend(graph[at].follow)
    return seen


def _instructions(text: str, dialect: Dialect) -> Iterator[str]:
    for line in text.splitlines():
        stripped = line.split(dialect.comment)[0].strip()
        directive = not stripped or stripped[0] in ".{}()$" or stripped.endswith(":")
        if dialect.label.match(stripped) or not directive:
            yield stripped


def _count(loop: list[Block], dialect: Dialect) -> Loop:
    lines = [re.sub(r"^@!?%\w+\s+", "", line) for block in loop for line in block.instructions]
    widths = [width for line in lines if (width := _width(line, dialect)) is not None]
    matrix = {name: sum(bool(pattern.match(line)) for line in lines) for name, pattern in dialect.matrix.items()}
    return Loop(
        instructions=len(lines),
        copies16=sum(width == 16 for width in widths),
        copies_narrow=sum(width != 16 for width in widths),
        scalar_loads=sum(bool(dialect.scalar.match(line)) for line in lines),
        matrix={name: count for name, count in matrix.items() if count},
    )


def _width(line: str, dialect: Dialect) -> int | None:
    for pattern, width in dialect.copies:
        if match := pattern.match(line):
            return int(match[1], 0) if width is None else width
    return None
