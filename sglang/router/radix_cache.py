"""The radix tree: which token sequences have their KV in which slots (SGLang's RadixAttention).

    root ── "You are a helpful" ──┬── " assistant. Hi"          an edge's tokens are in the node
            slots 7 8 9 10        │   slots 11 12 13 14         below it, with one slot a token
                                  └── " poet. Write"
                                      slots 40 41 42

A running request locks the path that it reads. What is not locked stays until its slots are needed,
and then goes leaf by leaf, least recently used first.
"""

from __future__ import annotations

import heapq

import numpy as np

from sglang.router.slots import SlotAllocator

EMPTY = np.empty(0, dtype=np.int32)


class Node:
    """The edge from `parent`, and what continues it. Valid only while it is in the tree: hold a
    lock to keep it there. A split keeps the node as the *lower* part, so a holder's path grows no
    shorter."""

    __slots__ = ("children", "in_heap", "key", "last_used", "locks", "parent", "slots")

    def __init__(self, parent: Node | None, key: np.ndarray, slots: np.ndarray) -> None:
        self.parent = parent
        self.key = key
        self.slots = slots
        self.children: dict[int, Node] = {}
        self.locks = 0
        self.last_used = 0
        self.in_heap = False


class RadixCache:
    """Keys are int32 token arrays. `disabled` remembers nothing (--disable-radix-cache)."""

    def __init__(self, allocator: SlotAllocator, disabled: bool = False) -> None:
        self.allocator = allocator
        self.disabled = disabled
        self.root = Node(None, EMPTY, EMPTY)
        self.num_tokens = 0
        """Tokens in the tree."""
        self.num_evictable = 0
        """Those in no locked path: what `evict` can free."""
        self.num_evicted = 0
        self.version = 0
        """Grows when the tree's content changes: earlier match lengths may be stale."""
        self._clock = 0
        self._heap: list[tuple[int, int, Node]] = []  # leaves to evict; entries may be stale

    # --- reading ---------------------------------------------------------------------------------

    def match_len(self, tokens: np.ndarray) -> int:
        """How many tokens of the beginning are cached. Changes nothing."""
        return sum(n for _, n in self._walk(tokens))

    def match(self, tokens: np.ndarray) -> tuple[np.ndarray, Node]:
        """(slots of the longest cached beginning, its node). Lock the node before anything else
        happens to the tree."""
        self._clock += 1
        slots, node = [EMPTY], self.root
        for child, n in self._walk(tokens):
            node = child if n == len(child.key) else self._split(child, n)
            node.last_used = self._clock
            slots.append(node.slots)
        return np.concatenate(slots), node

    def _walk(self, tokens: np.ndarray):
        """(node, tokens matched on its edge), from the root down; only the last may be partial."""
        node, at = self.root, 0
        while at < len(tokens):
            child = node.children.get(int(tokens[at]))
            if child is None:
                return
            n = _common_prefix_len(child.key, tokens[at:])
            partial = n < len(child.key)  # before the yield: `match` then splits the child
            yield child, n
            if partial:
                return
            node, at = child, at + n

    # --- writing ---------------------------------------------------------------------------------

    def insert(self, tokens: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, Node]:
        """Remembers that `slots` hold the KV of `tokens`.

        Returns the slots that the tree holds for these tokens, and their node. Where the tree knew
        a token already its own slot stays: the caller still owns the slot that it brought. The
        others belong to the tree now. (Disabled: no slots, the root; the caller owns all.)
        """
        if self.disabled:
            return EMPTY, self.root
        known, node = self.match(tokens)
        if len(known) < len(tokens):
            child = Node(node, tokens[len(known) :].copy(), slots[len(known) :].copy())
            child.last_used = self._clock
            node.children[int(child.key[0])] = child
            node = child
            self.num_tokens += len(child.key)
            self.num_evictable += len(child.key)
            self.version += 1
            self._offer(child)
        return np.concatenate([known, slots[len(known) :]]), node

    def _split(self, node: Node, n: int) -> Node:
        """Puts a new node above `node` that takes the first n tokens of its edge; returns it."""
        upper = Node(node.parent, node.key[:n], node.slots[:n])
        upper.locks, upper.last_used = node.locks, node.last_used
        upper.children[int(node.key[n])] = node
        assert node.parent is not None
        node.parent.children[int(node.key[0])] = upper
        node.parent, node.key, node.slots = upper, node.key[n:], node.slots[n:]
        return upper

    def lock(self, node: Node) -> None:
        """Keeps the path from the root to `node` in the tree until `unlock`."""
        while node.parent is not None:
            if node.locks == 0:
                self.num_evictable -= len(node.key)
            node.locks += 1
            node = node.parent

    def unlock(self, node: Node) -> None:
        while node.parent is not None:
            assert node.locks > 0, "unlocked more often than locked"
            node.locks -= 1
            if node.locks == 0:
                self.num_evictable += len(node.key)
                self._offer(node)
            node = node.parent

    # --- eviction --------------------------------------------------------------------------------

    def _offer(self, node: Node) -> None:
        """Puts a leaf that may go into the heap, once."""
        if not (node.in_heap or node.children or node.locks):
            node.in_heap = True
            heapq.heappush(self._heap, (node.last_used, id(node), node))

    def evict(self, n: int) -> None:
        """Frees at least n slots, or all that can be: least recently used leaves first."""
        wanted = min(self.allocator.num_free + n, self.allocator.num_slots)
        while self.allocator.num_free < wanted and self._heap:
            last_used, _, node = heapq.heappop(self._heap)
            node.in_heap = False
            if node.children or node.locks or node.last_used != last_used:
                self._offer(node)  # used since: to its new place, or out
                continue
            parent = node.parent
            assert parent is not None
            del parent.children[int(node.key[0])]
            self.allocator.free(node.slots)
            self.num_tokens -= len(node.key)
            self.num_evictable -= len(node.key)
            self.num_evicted += len(node.key)
            self.version += 1
            if parent is not self.root:
                self._offer(parent)

    def clear(self) -> None:
        """Evicts all that is not locked."""
        self.evict(self.num_evictable)


def _common_prefix_len(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    first = int(differs.argmax()) if n else 0
    return first if n and differs[first] else n
