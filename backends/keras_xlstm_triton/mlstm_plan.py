"""How the Triton mLSTM cuts a call: chunks, tiles, and segments of the sequence.

Triton itself is not imported: `explain` asks here on every machine.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

SMALLEST = 16  # a side of a product on tensor cores


@dataclass(frozen=True)
class Device:
    """What a plan depends on; as it stands, an H100."""

    name: str = "H100"
    processors: int = 132
    reads_shared_memory: bool = True  # tensor cores do, and need no registers for operands

    @classmethod
    def of(cls, x):
        if x.device.type != "cuda":
            return cls()  # interpreted
        properties = torch.cuda.get_device_properties(x.device)
        is_new = torch.version.hip is None and properties.major >= 9
        return cls(properties.name, properties.multi_processor_count, is_new)


class Tiles(NamedTuple):
    """Of a walk, whose memory is as wide as the head, and as a tile. It is multiplied in slices."""

    slice: int  # all powers of two
    tile: int
    warps: int
    on_chip: bool = True  # the memory; otherwise in device memory, which a slice at a time leaves

    def tiles(self, width):
        return -(-width // self.tile)


class Plan(NamedTuple):
    L: int
    segments: int
    by_value: Tiles  # of h and dv: DHQK x a tile of DHHV
    by_key: Tiles  # of dq and dk: DHHV x a tile of DHQK

    def __str__(self):
        form = "fused" if self.segments == 1 else f"split into {self.segments} segments"
        return (
            f"{form}, in chunks of {self.L} steps, by {self.by_value.tile} values a program, "
            f"and backward also by {self.by_key.tile} keys"
        )

    def numbers(self):
        """All of them, in one list."""
        return [self.L, self.segments, *map(int, (*self.by_value, *self.by_key))]

    @classmethod
    def of(cls, numbers):
        L, segments, *tiles = numbers
        return cls(L, segments, Tiles(*tiles[:4]), Tiles(*tiles[4:]))


def plan(dtype, S, heads, DHQK, DHHV, device, chunk_size=None, segments=None, tiles=None):
    """The sizes for a call. `chunk_size` is rounded to what the kernels have."""
    L = max(min(power_of_two(chunk_size or MOST), power_of_two(S)), SHORTEST)
    L = min(L, longest(dtype, device))
    by_value, by_key = tiles or tiles_of(dtype, L, DHQK, DHHV, device)
    chunks = max(-(-S // L), 1)
    programs = heads * by_value.tiles(DHHV)
    segments = segments or split(chunks, programs, device.processors)
    return Plan(L, min(segments, chunks), by_value, by_key)


SHORTEST, MOST = 32, 64
MEMORY = 2**13  # elements on chip: 32 registers of each thread; with twice as many, some spill


def longest(dtype, device):
    """Steps of a chunk, a power of two."""
    return MOST if device.reads_shared_memory and dtype != torch.float32 else SHORTEST


def tiles_of(dtype, L, DHQK, DHHV, device):
    """By value and by key.

    The memory of bfloat16 lies on chip, but for the widest heads. float32 has no tensor cores,
    float16 is multiplied as tf32, and tensor cores that do not read shared memory, as those for
    less than 64 rows, take operands from registers: no room is left there.
    """

    def tiles(full, width, widest):
        fits = MEMORY // power_of_two(max(full, 64))
        if dtype == torch.bfloat16 and L == MOST and fits >= SMALLEST:
            return Tiles(64, min(widest, power_of_two(width), fits), 8)
        if dtype == torch.float32:
            return Tiles(16, min(32, power_of_two(width)), 8, on_chip=False)
        return Tiles(32, min(L, power_of_two(width)), 8, on_chip=False)

    return tiles(DHQK, DHHV, 64), tiles(DHHV, DHQK, 32)


def others(dtype, L, DHQK, DHHV, device):
    """Pairs of tiles that may be faster than the first one, which is that of `tiles_of`."""
    first = by_value, by_key = tiles_of(dtype, L, DHQK, DHHV, device)
    if dtype == torch.float32:
        return [first, tuple(x._replace(slice=8) for x in first)]
    if L < MOST or DHQK % SMALLEST or DHHV % SMALLEST:  # what is not aligned takes more registers
        return [first]

    def off_chip(tile):
        widths = DHHV, DHQK
        return tuple(Tiles(32, min(tile, power_of_two(x)), 8, on_chip=False) for x in widths)

    if dtype == torch.float16:
        return list(dict.fromkeys([first, off_chip(32)]))
    value, key = off_chip(64)
    return list(dict.fromkeys([first, (value, by_key), (by_value, key), (value, key)]))


def variants(dtype, DHQK, DHHV, device):
    """All that a call may get, as pairs of L and tiles; the first is the usual one."""
    sizes = DHQK, DHHV, device
    lengths = dict.fromkeys([longest(dtype, device), SHORTEST])
    return [(L, tiles) for L in lengths for tiles in others(dtype, L, *sizes)]


def split(chunks, programs, processors):
    """Segments, of which the walk and the pass before it take the shortest, in chunks.

    The pass takes half of what the walk takes. What goes through memory for each segment is as
    much as a few chunks read.
    """

    def cost(segments):
        rounds, each = -(-programs * segments // processors), -(-chunks // segments)
        return rounds * (each if segments == 1 else 1.5 * each + 4)

    costs = [cost(2**x) for x in range(chunks.bit_length())]
    return 2 ** costs.index(min(costs))


def step_tiles(heads, DHQK, DHHV, device):
    """Rows and columns of C that a program of the decode step has in registers at a time."""
    tile = min(64, power_of_two(DHHV))
    while tile > SMALLEST and heads * -(-DHHV // tile) < 2 * device.processors:
        tile //= 2
    return min(2048 // tile, power_of_two(DHQK)), tile


def power_of_two(x):
    return max(1 << (x - 1).bit_length(), SMALLEST)
