"""What training and decoding cost on TPUs that are not here: the 7B on 1 to 64 chips.

The real compiler for TPUs compiles the whole step for a whole topology; no weight is allocated, and
no TPU is needed. Of each program the table says

- GB a chip: arguments (weights, optimizer, states), temporaries, and whether both fit,
- TFLOP of a chip's matrix unit, GB that it moves to and from its memory and to other chips,
- the time that each of these takes at the chip's peak, the slowest of which limits the step, and
  the share of the peak that useful products (6 a weight and token in training, 2 in decoding, and
  those of the memories) can then reach: no real step is faster than that.

    pip install -e ".[jax,hub]" libtpu
    python examples/scale_plan.py                                          the table, hours
    python examples/scale_plan.py v5p:2x2x1 batch=4 4x8192 --num_layers 2   a row of it, minutes
    python examples/scale_plan.py v5p:2x2x1 batch=1,model=4 --decode 64

A row is a topology, a mesh, and tokens as BATCHxLENGTH. The axes of the mesh say how it is shared
out: over `batch` rows of the batch and, as ZeRO has it, weights and optimizer; over `model` heads,
feed-forward layers and the vocabulary; over `sequence` the steps, and weights as over `batch`.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # what runs here; it compiles for another
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("KERAS_XLSTM_PALLAS", "tpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # beside another that compiles

import argparse
import math
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import keras
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from keras_xlstm.distribution import SequenceParallel
from keras_xlstm.models import XLSTMBackbone
from keras_xlstm.models.token_loss import TokenLoss
from keras_xlstm.ops import soft_cap


class Chip(NamedTuple):
    """Peaks of a chip, as its vendor states them: cloud.google.com/tpu/docs/{v5e,v5p,v6e}."""

    memory: float  # GB
    products: float  # TFLOP/s of bfloat16
    bandwidth: float  # GB/s of its memory
    links: float  # GB/s out to other chips, over all its links; as many come in


CHIPS = {
    "v5e": Chip(16, 197, 819, 200),
    "v5p": Chip(95, 459, 2765, 600),
    "v6e": Chip(32, 918, 1640, 400),
}
LARGE = dict(vocabulary_size=50304, num_layers=32, hidden_dim=4096, num_heads=8)  # the 7B
SOFT_CAP = 30.0


def distribution(topology, axes):
    """What shares a model out over a topology.

    Args:
        topology: string, such as "v5p:2x2x1".
        axes: dict from the names of axes of the mesh to their sizes.
    """
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    axes = {"batch": 1} | axes
    if math.prod(axes.values()) != len(devices):
        raise ValueError(
            f"The axes of the mesh must multiply to the chips of {topology}, {len(devices)}. "
            f"Received: {axes}."
        )
    mesh = keras.distribution.DeviceMesh(tuple(axes.values()), tuple(axes), devices)
    layout_map = (
        XLSTMBackbone.get_layout_map(mesh)
        if "model" in axes
        else keras.distribution.LayoutMap(mesh)
    )
    if "model" not in axes:
        # Or else, of weights that are spread, the compiler may take the axis: logits would then be
        # sums over chips, of all rows on each.
        steps = "sequence" if "sequence" in axes else None
        layout_map["token_embedding/output$"] = ("batch", steps, None)
    cls = SequenceParallel if "sequence" in axes else keras.distribution.ModelParallel
    return cls(layout_map=layout_map, batch_dim_name="batch")


class Layout:
    """Where arrays lie: weights as the layout map has them, and spread over the other axes."""

    def __init__(self, distribution, spread=True):
        self.distribution, self.spread = distribution, spread
        self.mesh = distribution.device_mesh.backend_mesh

    def weight(self, variable):
        """Of each weight, the longest axis that is whole and divides, but for the vocabulary.

        Split by vocabulary, logits would want the hidden states of all rows on all chips.
        """
        layout = self.distribution._layout_map.get(variable.path)
        spec = list(layout.axes) if layout else [None] * len(variable.shape)
        if self.spread and len(spec) > 1:
            for name, size in self.mesh.shape.items():
                whole = [n for n, axis in enumerate(spec) if axis is None]
                whole = [n for n in whole if variable.shape[n] % size == 0]
                if "token_embedding" in variable.path:
                    whole = [n for n in whole if variable.shape[n] != max(variable.shape)]
                if name != "model" and size > 1 and whole:
                    spec[max(whole, key=lambda n: variable.shape[n])] = name
        return self._array(variable.shape, variable.dtype, spec)

    def data(self, shape, dtype="int32"):
        axes = self.distribution.get_data_layout(shape).axes
        return self._array(shape, dtype, axes)

    def state(self, x):
        """(B, NH, ...) or, of the layer's own flat states, (B, NH * ...)."""
        model = "model" if "model" in self.mesh.shape else None
        return self._array(x.shape, "float32", ("batch", model))

    def _array(self, shape, dtype, axes):
        spec = PartitionSpec(*axes)
        sharding = NamedSharding(self.mesh, spec)
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)


def build(config, policy, remat=False, optimizer=None):
    """A backbone without numbers, and its optimizer."""
    keras.config.set_dtype_policy(policy)
    blocks = [f"block_{n}" for n in range(config["num_layers"])] if remat else []
    remat = keras.RematScope(mode="list_of_layers", layer_names=blocks)
    with remat, keras.StatelessScope(initialize_variables=False):
        backbone = XLSTMBackbone(**config)
        if optimizer:
            optimizer.build(backbone.trainable_variables)
    return backbone


def logits_of(backbone, hidden_states):
    logits = backbone.token_embedding(hidden_states, reverse=True)
    return soft_cap(keras.ops.cast(logits, "float32"), SOFT_CAP)


def train_step(config, layout, batch, length):
    """AdamW, products in bfloat16, blocks computed again in the backward pass: lowered."""
    optimizer = keras.optimizers.AdamW(1e-4)
    backbone = build(config, "mixed_bfloat16", remat=True, optimizer=optimizer)
    variables, others = backbone.trainable_variables, backbone.non_trainable_variables
    weights, fixed = (list(map(layout.weight, x)) for x in (variables, others))
    slots = {
        slot.path: weight
        for slots in (optimizer._momentums, optimizer._velocities)
        for slot, weight in zip(slots, weights, strict=True)
    }
    state = [slots.get(x.path) or layout.weight(x) for x in optimizer.variables]
    tokens = layout.data((batch, length))

    def step(weights, state, fixed, tokens, targets):
        def loss(weights):
            mapping = [*zip(variables, weights, strict=True), *zip(others, fixed, strict=True)]
            with keras.StatelessScope(state_mapping=mapping):
                inputs = {"token_ids": tokens, "padding_mask": jnp.ones_like(tokens)}
                logits = logits_of(backbone, backbone(inputs, training=True))
                return jnp.mean(TokenLoss()(targets, logits))

        value, gradients = jax.value_and_grad(loss)(weights)
        weights, state = optimizer.stateless_apply(state, gradients, weights)
        return value, weights, state

    return jax.jit(step, donate_argnums=(0, 1)), (weights, state, fixed, tokens, tokens)


def decode_step(config, layout, batch):
    """One token of each row, from states to states; all in bfloat16 but the states: lowered."""
    backbone = build(config, "bfloat16")
    weights = [layout.weight(x) for x in backbone.variables]
    states = jax.eval_shape(lambda: backbone.stack.get_initial_state(batch))
    states = jax.tree.map(layout.state, states)

    def step(weights, states, tokens):
        mapping = list(zip(backbone.variables, weights, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            x = backbone.token_embedding(tokens)
            x, states = backbone.stack(x, initial_state=states, return_state=True)
            return jnp.argmax(logits_of(backbone, x), -1), states

    tokens = layout.data((batch, 1))
    return jax.jit(step, donate_argnums=(1,)), (weights, states, tokens)


def compile(topology, axes, batch, length, config=LARGE, decode=False, options=None):
    """The program for a whole topology, compiled, and its text.

    Returns:
        `(compiled, text)`. The text is what the compiler writes to a folder, since JAX 0.10 cannot
        read back programs of libtpu in which transfers run beside products.
    """
    plan = distribution(topology, axes)
    layout = Layout(plan, spread=not decode)
    if decode:
        step, arguments = decode_step(config, layout, batch)
    else:
        step, arguments = train_step(config, layout, batch, length)
    keras.distribution.set_distribution(plan)
    try:
        lowered = step.lower(*arguments)
    finally:
        keras.distribution.set_distribution(None)
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=dump | (options or {}))
        text = next(Path(folder).glob("*jit_step*after_optimizations.txt")).read_text()
    return compiled, text


COLLECTIVE = re.compile(
    r" = (\S+|\(.*?\)) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\(.*?channel_id=(\d+)(.*)"
)
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


def collectives(text, chips):
    """How many of each kind a program has, and the bytes that each chip sends for them, by rings.

    Returns:
        Dict from the kind to `(number, bytes)`.
    """
    found = {}
    for result, kind, channel, rest in COLLECTIVE.findall(text):
        # A `-start` returns its operand as well: of a tuple, the largest is what comes out.
        shapes = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result)
        size = max(
            SIZES.get(t, 4) * math.prod(map(int, filter(None, d.split(",")))) for t, d in shapes
        )
        if kind == "all-reduce" and "from-cross-replica-sharding" in rest:
            kind = "reduce-scatter"  # of which each chip then keeps its part, in the same fusion
        group = re.search(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])", rest)
        n = chips
        if group:
            n = len(group[1].split(",")) if group[1] else int(group[2])
        elif over := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", rest):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", over[1]))
            n = math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", over[2]))
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(kind, (n - 1) / n)
        found[kind, channel] = size * share  # a program may name one twice
    kinds = {kind for kind, _ in found}
    return {k: (sum(x == k for x, _ in found), sum(b for (x, _), b in found.items() if x == k))
            for k in sorted(kinds)}  # fmt: skip


def kernel_flops(config, batch, length, decode):
    """Of the mLSTM, which the compiler does not count: products of all layers, forward.

    Within chunks of 128 steps q k^T and what it weighs, between them k v^T and its reading.
    """
    D, NH = config["hidden_dim"], config["num_heads"]
    qk, v, L = D // 2 // NH, D // NH, 1 if decode else 128
    return 2 * batch * length * NH * config["num_layers"] * (L * (qk + v) + 2 * qk * v)


def weights_in_products(config):
    """All but the embedding, which is looked up."""
    looked_up = config["vocabulary_size"] * config["hidden_dim"]
    return build(config, "float32").count_params() - looked_up


class Program(NamedTuple):
    """What the compiler says of a step, a chip; extended over depths if `depths` are two."""

    arguments: float
    temporaries: float
    flops: float
    moved: float
    sent: float
    counts: dict

    @classmethod
    def of(cls, topology, axes, batch, length, config=LARGE, decode=False):
        compiled, text = compile(topology, axes, batch, length, config, decode)
        chips = math.prod(axes.values())
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
        found = collectives(text, chips)
        passes = 1 if decode else 4  # forward, again, and twice that backward
        return cls(
            memory.argument_size_in_bytes,
            memory.temp_size_in_bytes,
            cost["flops"] + passes * kernel_flops(config, batch, length, decode) / chips,
            cost["bytes accessed"],
            sum(sent for _, sent in found.values()),
            {kind: number for kind, (number, _) in found.items()},
        )

    @classmethod
    def extended(cls, *arguments, config=LARGE, depths=(2, 4), **kwargs):
        """Of two shallow models, on to the depth of `config`."""
        a, b = (cls.of(*arguments, config=config | {"num_layers": n}, **kwargs) for n in depths)
        steps = (config["num_layers"] - depths[0]) / (depths[1] - depths[0])

        def on(x, y):
            return x + steps * (y - x)

        counts = {k: round(on(a.counts.get(k, 0), b.counts[k])) for k in b.counts}
        return cls(*map(on, a[:-1], b[:-1]), counts)


HEADER = (
    "topology     mesh                 tokens     GB: arguments  temporaries  fits  "
    "TFLOP  GB moved  sent   ms: products  memory  links   limit     MFU at most"
)


def line(program, topology, axes, batch, length, config=LARGE, decode=False, mark=""):
    chip = CHIPS[topology.split(":")[0]]
    used = (program.arguments + program.temporaries) / 1e9
    times = {
        "products": program.flops / chip.products / 1e9,
        "memory": program.moved / chip.bandwidth / 1e6,
        "links": program.sent / chip.links / 1e6,
    }
    limit = max(times, key=times.get)
    chips, passes = math.prod(axes.values()), 1 if decode else 3
    useful = 2 * weights_in_products(config) * batch * length
    useful += kernel_flops(config, batch, length, decode)
    mfu = passes * useful / chips / (chip.products * 1e12) / (times[limit] / 1e3)
    mesh = ",".join(f"{k}={v}" for k, v in axes.items())
    tokens = f"{batch}x{length}"
    counts = ", ".join(f"{n} {kind}" for kind, n in program.counts.items())
    return (
        f"{topology:12} {mesh:20} {tokens:10} {program.arguments / 1e9:13.2f}{mark:1} "
        f"{program.temporaries / 1e9:11.2f}  {'yes' if used < chip.memory else 'NO':4} "
        f"{program.flops / 1e12:6.1f} {program.moved / 1e9:9.1f} {program.sent / 1e9:5.1f} "
        f"{times['products']:14.1f} {times['memory']:7.1f} {times['links']:6.1f}   {limit:9} "
        f"{100 * mfu:5.0f} %   {counts}"
    )


# The whole depth where it is None.
TRAINING = [
    ("v5p:2x2x1", dict(batch=4), 4, 8192, None),
    ("v5p:4x4x4", dict(batch=1, sequence=64), 1, 2**20, (1, 2)),
    ("v5e:4x4", dict(batch=16), 16, 2048, None),
    ("v6e:8x8", dict(batch=64), 64, 8192, (1, 2)),
    ("v5p:4x4x4", dict(batch=64), 64, 8192, (1, 2)),
    ("v5p:2x2x1", dict(batch=1, model=4), 4, 8192, (2, 4)),
    ("v5p:4x4x4", dict(batch=8, model=8), 64, 8192, (2, 4)),
    ("v5p:2x2x1", dict(batch=1, sequence=4), 4, 8192, (2, 4)),
    ("v5p:4x4x4", dict(batch=4, sequence=16), 4, 2**17, (2, 4)),
]
DECODING = [
    ("v5p:2x2x1", dict(batch=4), 256, None),
    ("v5e:2x2", dict(batch=1, model=4), 64, None),
    ("v6e:8x8", dict(batch=8, model=8), 2048, None),
]


def size(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, not {text!r}")
    return int(text)


def mesh(text):
    pairs = [x.partition("=") for x in text.split(",")]
    if not {name for name, *_ in pairs} <= {"batch", "model", "sequence"}:
        raise argparse.ArgumentTypeError(f"must be like batch=2,model=2, not {text!r}")
    return {name: size(number) for name, _, number in pairs}


def tokens(text):
    if text.count("x") != 1:
        raise argparse.ArgumentTypeError(f"must be BATCHxLENGTH, not {text!r}")
    return tuple(map(size, text.split("x")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("topology", nargs="?", help="such as v5p:2x2x1; none for the whole table")
    parser.add_argument("mesh", nargs="?", type=mesh, default="batch=1", help="batch=2,model=2")
    parser.add_argument("tokens", nargs="?", type=tokens, default="8x8192", help="BATCHxLENGTH")
    parser.add_argument("--decode", type=size, metavar="BATCH", help="the decoding step instead")
    parser.add_argument(
        "--depths", type=size, nargs=2, help="compile these, extend to --num_layers"
    )
    for name, value in LARGE.items():
        parser.add_argument(f"--{name}", type=size, default=value)
    given = parser.parse_args()
    if given.topology and given.topology.split(":")[0] not in CHIPS:
        parser.error(f"topology must be of one of {list(CHIPS)}, such as v5p:2x2x1")
    config = {name: getattr(given, name) for name in LARGE}
    rows = [(*row, False) for row in TRAINING]
    rows += [(topology, axes, batch, 1, depths, True) for topology, axes, batch, depths in DECODING]
    if given.topology:
        axes, (batch, length) = given.mesh, given.tokens
        if given.decode:
            batch, length = given.decode, 1
        rows = [(given.topology, axes, batch, length, given.depths, bool(given.decode))]
    print(HEADER)
    for topology, axes, batch, length, depths, decode in rows:
        start, what = time.monotonic(), (topology, axes, batch, length)
        if depths:
            program = Program.extended(*what, config=config, depths=depths, decode=decode)
        else:
            program = Program.of(*what, config=config, decode=decode)
        print(line(program, *what, config, decode, "*" if depths else ""), flush=True)
        print(f"({time.monotonic() - start:.0f} s)", file=sys.stderr)


if __name__ == "__main__":
    main()
