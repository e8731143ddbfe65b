"""What a SentencePiece model's normalisation rules can do, read from its compiled table.

The table is the size of a trie (u32), the trie as a double array of 32-bit units (Darts-clone), and the replacement
strings, each ended by a NUL. A rule replaces the longest match at a position, so a text can be normalised in parts
exactly if no rule's left side reaches over the place where the parts meet.
"""

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from more_megatron.data.errors import DataError

__all__ = ["RuleTable", "read_rules"]

_LEAF = np.uint32(1 << 31)
_LABEL = np.uint32((1 << 31) | 0xFF)
_PRINTABLE = bytes(range(0x21, 0x7F))


@dataclass(frozen=True)
class RuleTable:
    """The facts about a rule table on which cutting a text rests.

    Args:
        inner_bytes: bytes that occur in some rule's left side after its first byte.
        keeps_space: whether no rule changes a space or begins with one.
        blanks: ASCII bytes whose only rule is to become one space.
        plain: printable ASCII bytes that stay as they are in a text of such bytes.
        replacements: all replacement strings, end to end.
    """

    inner_bytes: frozenset[int]
    keeps_space: bool
    blanks: bytes
    plain: bytes
    replacements: bytes


def read_rules(table: bytes) -> RuleTable:
    """Read a `precompiled_charsmap`.

    Args:
        table: the compiled table; empty for a model that does not normalise.

    Returns:
        What its rules can do.

    Raises:
        DataError: the table is damaged.
    """
    if not table:
        return RuleTable(frozenset(), True, b"", _PRINTABLE, b"")
    (size,) = struct.unpack_from("<I", table)
    if size % 4 or size + 4 > len(table) or size == 0:
        raise DataError("the tokenizer model's normalisation table is damaged; export or train the model again")
    units = np.frombuffer(table, dtype="<u4", count=size // 4, offset=4)
    strings = table[4 + size :]
    parents, children = _edges(units)
    root = int(_offset(units[:1])[0])
    first = np.flatnonzero(parents == root)
    inner = _labels_below(units, parents, children, children[first])
    blanks = _blanks(units, strings, parents, children, first)
    keeps_space = 0x20 in blanks or 0x20 not in (units[first] & np.uint32(0xFF))
    return RuleTable(frozenset(inner), keeps_space, blanks, _plain(units, parents, children, first), strings)


def _offset(units: NDArray[np.uint32]) -> NDArray[np.int64]:
    return ((units >> 10) << ((units & np.uint32(1 << 9)) >> 6)).astype(np.int64)


def _edges(units: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each unit, the node that it can be reached from and the node that it leads to.

    A node is the place its children's labels are combined with (exclusive or) to find them. A unit that is no edge
    gets the node -1, and so does one with label 0, which holds a value.
    """
    index = np.arange(len(units))
    label = (units & np.uint32(0xFF)).astype(np.int64)
    is_edge = ((units & _LEAF) == 0) & (label > 0)
    parents = np.where(is_edge, index ^ label, -1)
    return parents, np.where(is_edge, index ^ _offset(units), -1)


def _labels_below(
    units: NDArray[np.uint32], parents: NDArray[np.int64], children: NDArray[np.int64], nodes: NDArray[np.int64]
) -> set[int]:
    labels: set[int] = set()
    seen = np.zeros(len(units) + 256, dtype=bool)
    while len(nodes):
        nodes = nodes[nodes < len(seen)]
        seen[nodes] = True
        edges = np.flatnonzero((parents >= 0) & np.isin(parents, nodes))
        labels.update(np.unique(units[edges] & np.uint32(0xFF)).tolist())
        nodes = np.unique(children[edges])
        nodes = nodes[(nodes >= len(seen)) | ~seen[np.minimum(nodes, len(seen) - 1)]]
    return labels


def _plain(
    units: NDArray[np.uint32], parents: NDArray[np.int64], children: NDArray[np.int64], first: NDArray[np.int64]
) -> bytes:
    """Printable bytes with which no rule of ASCII bytes begins."""
    labels = units & np.uint32(0xFF)
    has_value = ((units >> 8) & 1).astype(bool)
    ascii_edges = np.flatnonzero((parents >= 0) & (labels < 0x80))
    changed = set()
    for unit in first[labels[first] < 0x80].tolist():
        edges = np.array([unit])
        while len(edges) and not has_value[edges].any():
            edges = ascii_edges[np.isin(parents[ascii_edges], children[edges])]
        if len(edges):
            changed.add(int(labels[unit]))
    return bytes(byte for byte in _PRINTABLE if byte not in changed)


def _blanks(
    units: NDArray[np.uint32],
    strings: bytes,
    parents: NDArray[np.int64],
    children: NDArray[np.int64],
    first: NDArray[np.int64],
) -> bytes:
    blanks = bytearray()
    for unit in first.tolist():
        label = int(units[unit]) & 0xFF
        node = int(children[unit])
        has_value = bool((int(units[unit]) >> 8) & 1)
        if label >= 0x80 or not has_value or np.any(parents == node):
            continue
        value = int(units[node]) & 0x7FFFFFFF
        if strings[value : value + 2] == b" \0":
            blanks.append(label)
    return bytes(blanks)
