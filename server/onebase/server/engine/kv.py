"""The key-value cache: one place ("slot") per running completion, grown along the length as completions need it.

Layout per layer: keys and values of shape [slots, kv_heads, capacity, head_dim]. A slot's row holds its sequence from
position 0; what lies past its length is old and is masked by whoever reads it.
"""

from __future__ import annotations

import torch

from onebase.server.engine.batch import padded


class KVCache:
    """Keys and values of every layer, for up to `slots` sequences of up to `max_length` tokens."""

    def __init__(self, slots: int, max_length: int) -> None:
        self.slots = slots
        self.max_length = max_length
        self._free = list(range(slots - 1, -1, -1))  # lowest last: slots in use stay neighbours
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def used(self) -> int:
        """Slots in use."""
        return self.slots - len(self._free)

    @property
    def bytes(self) -> int:
        """Device memory held, in bytes."""
        return sum(t.numel() * t.element_size() for pair in self._layers.values() for t in pair)

    @property
    def free(self) -> int:
        """Slots not in use."""
        return len(self._free)

    def take(self) -> int:
        """The lowest free slot; IndexError if there is none."""
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        """Frees a slot."""
        self._free.append(slot)
        self._free.sort(reverse=True)

    def write(self, layer: int, slot: int, past: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores [kv_heads, t, head_dim] of one sequence from position `past` on."""
        stop = past + keys.shape[1]
        k, v = self._room(layer, stop, keys, values)
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
        """Stores one token each, [kv_heads, B, head_dim], at positions [B] of slots [B]."""
        k, v = self._room(layer, span, keys, values)
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

    def copy(self, source: int, targets: list[int], length: int) -> None:
        """Gives other slots a copy of the first `length` tokens of one: a prompt's completions share its prefill."""
        for k, v in self._layers.values():
            for target in targets:
                k[target, :, :length] = k[source, :, :length]
                v[target, :, :length] = v[source, :, :length]

    def _room(
        self, layer: int, stop: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's tensors, grown to hold `stop` tokens."""
        pair = self._layers.get(layer)
        capacity = 0 if pair is None else pair[0].shape[2]
        if pair is not None and capacity >= stop:
            return pair
        wanted = min(padded(max(stop, 2 * capacity, 64)), padded(self.max_length))
        grown = (_grow(pair and pair[0], self.slots, wanted, keys), _grow(pair and pair[1], self.slots, wanted, values))
        self._layers[layer] = grown
        return grown


def _grow(old: torch.Tensor | None, slots: int, capacity: int, like: torch.Tensor) -> torch.Tensor:
    # zeros, not empty: masked positions are multiplied by zero, and zero times NaN would be NaN
    new = like.new_zeros(slots, like.shape[0], capacity, like.shape[2])
    if old is not None:
        new[:, :, : old.shape[2]] = old
    return new
