"""The key-value cache: one slot per running completion, within a budget of bytes.

Layout per layer: keys and values of shape [slots, kv_heads, capacity, head_dim]. A slot's row holds its sequence from
position 0, so that a step reads neighbouring slots in place. Slots and capacity both grow as completions need them;
slots times capacity never exceeds the budget. What lies past a sequence's length is masked by the reader, and is zero:
a masked position still weighs zero times what is there, and zero times the infinity or NaN that a broken adapter left
would be NaN. So a slot that is taken is zeroed first, as far as it was ever written, but for what it keeps.

A slot that was given back keeps its tokens until it is used again: a prompt that begins like one of them, under the
same version of the same adapter, copies what they share.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from onebase.server.engine.batch import padded

GROWTH = 64
"""Tokens by which capacity grows."""

LEAST_SHARED = 16
"""Tokens from which a shared beginning is worth copying."""


class KVCache:
    """Keys and values of every layer.

    Args:
        slots: most sequences at once.
        max_length: longest sequence in tokens.
        budget: most bytes; 0 is no limit but slots times max_length.
        token_bytes: bytes of one token in all layers; 0 if it is not known yet, which means no limit.
    """

    def __init__(self, slots: int, max_length: int, budget: int = 0, token_bytes: int = 0) -> None:
        self.slots = slots
        self.max_length = max_length
        self._tokens = budget // token_bytes if budget and token_bytes else slots * padded(max_length)
        self.budget = budget
        self.allowed = slots  # so many may be in use: fewer than there are after memory ran out
        self._free = list(range(slots - 1, -1, -1))  # lowest last: slots in use stay neighbours
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._contents: dict[int, tuple[Hashable, Sequence[int]]] = {}
        self._reach: dict[int, int] = {}  # tokens from which a slot is zeros
        self._capacity = 0

    @property
    def used(self) -> int:
        """Slots in use."""
        return self.slots - len(self._free)

    @property
    def bytes(self) -> int:
        """Device memory held, in bytes."""
        layers = list(self._layers.values())  # at once: the event loop asks while layers come and go
        return sum(t.numel() * t.element_size() for pair in layers for t in pair)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers; known after the first write."""
        return sum(t.shape[1] * t.shape[3] * t.element_size() for pair in self._layers.values() for t in pair)

    # ------------------------------------------------------------------------------------------------- admission

    def fits(self, length: int, more: int = 0) -> bool:
        """Whether the slots in use, and so many more, may each hold `length` tokens."""
        rows = max([self._highest(), *sorted(self._free)[:more]]) + 1
        return rows * max(self._rounded(length), self._capacity) <= self._tokens

    def _highest(self) -> int:
        """The highest slot in use; -1 if none is."""
        return max(set(range(self.slots)) - set(self._free), default=-1)

    def free(self, length: int) -> int:
        """How many more sequences of `length` tokens may begin."""
        if not self.used and not self.fits(length, 1):
            self.forget()  # what is kept for prompts that begin alike must not stand in the way
        count = 0
        while count < min(len(self._free), self.allowed - self.used) and self.fits(length, count + 1):
            count += 1
        return count

    def _rounded(self, length: int) -> int:
        """The capacity that holds `length` tokens: some room to grow, so that tensors are rarely made anew."""
        return min(-(-length // GROWTH) * GROWTH, padded(self.max_length))

    def holds(self, length: int) -> bool:
        """Whether a sequence of `length` tokens could ever be held, alone."""
        return self._rounded(length) <= self._tokens

    def take(self, source: int = -1, shared: int = 0) -> int:
        """The lowest free slot, zeroed; IndexError if there is none.

        If it is `source`, its first `shared` tokens stay. It may be taken for another sequence than the one that
        copies them, and be written over later.
        """
        slot = self._free.pop()
        self._contents.pop(slot, None)
        kept, stop = shared if slot == source else 0, self._reach.get(slot, 0)
        for pair in self._layers.values() if kept < stop else ():
            for t in pair:
                t[slot : slot + 1, :, kept:stop].zero_()  # a slot beyond the tensor's end is zeros when it grows
        self._reach[slot] = kept
        return slot

    def reach(self, slot: int, stop: int) -> None:
        """Says that a slot will be written, up to a position; to be said before its tokens are."""
        self._reach[slot] = max(stop, self._reach.get(slot, 0))

    def give_back(self, slot: int, key: Hashable = None, tokens: Sequence[int] = ()) -> None:
        """Frees a slot; `tokens` are what it holds under `key`, for prompts that begin alike."""
        self._free.append(slot)
        self._free.sort(reverse=True)
        if len(tokens) >= LEAST_SHARED:
            self._contents[slot] = (key, tokens)

    def note(self, slot: int, key: Hashable, tokens: Sequence[int]) -> None:
        """Says what a slot in use holds."""
        self._contents[slot] = (key, tokens)

    def shared(self, key: Hashable, tokens: Sequence[int]) -> tuple[int, int]:
        """The slot that holds the longest beginning of `tokens` under `key`, and how long it is; (-1, 0) if none."""
        best, longest = -1, LEAST_SHARED - 1
        for slot, (other, held) in self._contents.items():
            if other == key:
                length = _common(held, tokens)
                if length > longest:
                    best, longest = slot, length
        return (best, longest) if best >= 0 else (-1, 0)

    def worth_waiting(self, key: Hashable, tokens: Sequence[int], others: Sequence[Sequence[int]]) -> bool:
        """Whether one of the other prompts, which are on their way, will leave a longer beginning to copy."""
        alike = max((_common(other, tokens) for other in others), default=0)
        return alike >= LEAST_SHARED and alike > self.shared(key, tokens)[1]

    def forget(self) -> None:
        """Frees the memory, if no slot is in use."""
        if not self.used:
            self._layers.clear()
            self._contents.clear()
            self._reach.clear()
            self._capacity = 0

    # ---------------------------------------------------------------------------------------------------- tensors

    def write(self, layer: int, slot: int, past: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores [kv_heads, t, head_dim] of one sequence from position `past` on."""
        stop = past + keys.shape[1]
        k, v = self._room(layer, slot + 1, stop, keys, values)
        self.reach(slot, stop)
        k[slot, :, past:stop] = keys
        v[slot, :, past:stop] = values

    def write_tokens(
        self,
        layer: int,
        slots: torch.Tensor,
        positions: torch.Tensor,
        span: int,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Stores one token each, [kv_heads, B, head_dim], at positions [B] of slots [B], which `reach` was told."""
        k, v = self._room(layer, 0, span, keys, values)
        k[slots, :, positions] = keys.transpose(0, 1)
        v[slots, :, positions] = values.transpose(0, 1)

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, [slots, kv_heads, capacity, head_dim]."""
        return self._layers[layer]

    def view(self, layer: int, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of neighbouring slots in place, [count * kv_heads, capacity, head_dim]."""
        found = []
        for t in self._layers[layer]:
            slots, kv_heads, capacity, dim = t.shape
            flat = t.view(slots * kv_heads, capacity, dim)
            found.append(flat[first * kv_heads : (first + count) * kv_heads])
        return found[0], found[1]

    def copy(self, source: int, targets: Sequence[int], length: int) -> None:
        """Gives other slots a copy of the first `length` tokens of one."""
        if not targets:
            return
        for target in targets:
            self.reach(target, length)
        for layer, (k, v) in list(self._layers.items()):
            grown_k, grown_v = self._room(layer, max(targets) + 1, length, k[source], v[source])
            for target in targets:
                grown_k[target, :, :length] = grown_k[source, :, :length]
                grown_v[target, :, :length] = grown_v[source, :, :length]

    def _room(
        self, layer: int, rows: int, stop: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's tensors, with at least so many rows and capacity for `stop` tokens."""
        pair = self._layers.get(layer)
        had_rows, had = (0, 0) if pair is None else (pair[0].shape[0], pair[0].shape[2])
        if pair is not None and had >= stop and had_rows >= rows:
            return pair
        capacity = max(had, self._rounded(stop))
        needed = max(rows, self._highest() + 1)  # what nobody uses may go where room is short
        rows = max(needed, min(self.slots, 2 * had_rows if had_rows < needed else had_rows, self._tokens // capacity))
        rows = needed if self.allowed < self.slots else rows
        self._contents = {slot: held for slot, held in self._contents.items() if slot < rows}
        grown = (_grow(pair and pair[0], rows, capacity, keys), _grow(pair and pair[1], rows, capacity, values))
        self._layers[layer] = grown
        self._capacity = max(self._capacity, capacity)
        return grown


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    length = min(len(one), len(other))
    for i in range(length):
        if one[i] != other[i]:
            return i
    return length


def _grow(old: torch.Tensor | None, rows: int, capacity: int, like: torch.Tensor) -> torch.Tensor:
    # zeros, not empty: masked positions are multiplied by zero, and zero times NaN would be NaN
    new = like.new_zeros(rows, like.shape[0], capacity, like.shape[2])
    if old is not None:
        new[: old.shape[0], :, : old.shape[2]] = old[:rows]
    return new
