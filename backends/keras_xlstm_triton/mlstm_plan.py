"""How the Triton mLSTM cuts a call: chunks, tiles, and segments of the sequence.

Triton itself is not imported: `explain` asks here on every machine.
"""

from dataclasses import dataclass

import torch

SMALLEST = 16  # a side of a product on tensor cores


@dataclass(frozen=True)
class Device:
    """What a plan depends on."""

    shared_memory: int = 227 * 1024  # bytes that a program may have
    processors: int = 132

    @classmethod
    def of(cls, x):
        if x.device.type != "cuda":
            return cls()  # interpreted: as if it were an H100
        properties = torch.cuda.get_device_properties(x.device)
        shared = getattr(properties, "shared_memory_per_block_optin", 64 * 1024)
        return cls(shared, properties.multi_processor_count)


@dataclass(frozen=True)
class Tiles:
    """Of a walk, whose memory is as wide as the head, and as a tile. It is multiplied in slices."""

    slice: int
    tile: int
    warps: int

    def count(self, width):
        return -(-width // self.tile)


@dataclass(frozen=True)
class Plan:
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


def plan(dtype, S, heads, DHQK, DHHV, device, chunk_size=None, segments=None):
    """The sizes for a call. `chunk_size` is rounded to what the kernels have."""
    L = min(power_of_two(chunk_size or MOST), power_of_two(S), longest(dtype))
    by_value, by_key = tiles_of(dtype, DHQK, DHHV)
    chunks = max(-(-S // L), 1)
    programs = heads * by_value.count(DHHV)
    segments = segments or split(chunks, programs, device.processors)
    return Plan(L, min(segments, chunks), by_value, by_key)


MOST = 64
WIDEST = 512  # heads; beyond, even the smallest tile does not fit the registers
MEMORY = 2**13  # elements on chip: 32 registers of 256 threads; with twice as many, some spill


def longest(dtype):
    """Steps of a chunk. Without tensor cores, operands fill the registers."""
    return 16 if dtype == torch.float32 else 64


def tiles_of(dtype, DHQK, DHHV):
    """By value and by key."""
    return tiles(dtype, DHQK, DHHV, most=64), tiles(dtype, DHHV, DHQK, most=32)


def tiles(dtype, full, width, most):
    if dtype == torch.float32:
        return Tiles(16, 16, 4)
    fits = MEMORY if dtype == torch.bfloat16 else MEMORY // 2
    tile = min(most, power_of_two(width), max(fits // power_of_two(full), SMALLEST))
    return Tiles(min(64, power_of_two(full)), tile, 8)


def split(chunks, programs, processors):
    """Segments, of which the walk and the pass before it take the shortest, in chunks.

    The pass takes half of what the walk takes. What goes through memory for each segment is as
    much as a few chunks read.
    """

    def cost(segments):
        rounds, each = -(-programs * segments // processors), -(-chunks // segments)
        return rounds * (each if segments == 1 else 1.5 * each + 4)

    return min((2**x for x in range(chunks.bit_length())), key=cost)


def power_of_two(x):
    return max(1 << (x - 1).bit_length(), SMALLEST)
