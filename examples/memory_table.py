"""What `predict_memory` says of a train step, beside what the framework reports of it.

On JAX that is what the compiled program holds, its arguments and its temporaries; on PyTorch the
most that its allocator held at once, while Python's garbage collector ran before each block and
each update: what Keras does with trees of tensors keeps those that layers were given until it runs.
TensorFlow does not say what a step on a CPU takes.

    python examples/memory_table.py

Half a minute a row on JAX, two cores. Leaves nothing behind.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
# XLA's other order of operations on CPUs lets more run at once, in more memory.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_enable_concurrency_optimized_scheduler=false"
)

import functools
import gc
import itertools
import sys
from contextlib import nullcontext

import keras
import numpy as np

from keras_xlstm.models import XLSTMBackbone, XLSTMCausalLM, predict_memory

SMALL = dict(vocabulary_size=512, num_layers=3, hidden_dim=128, num_heads=4)
ORIGINAL = SMALL | dict(block_style="original")
# Arguments of the backbone, rows, steps, whether blocks are computed again.
ROWS = {
    "large": (SMALL, 16, 256, False),
    "large, long": (SMALL, 2, 4096, False),
    "large, long, remat": (SMALL, 2, 4096, True),
    "large, wide": (SMALL | dict(hidden_dim=384, num_heads=2), 4, 512, False),
    "large, wide, remat": (SMALL | dict(hidden_dim=384, num_heads=2), 4, 512, True),
    "large, 8 layers": (SMALL | dict(num_layers=8), 4, 1024, False),
    "large, 8 layers, remat": (SMALL | dict(num_layers=8), 4, 1024, True),
    "large, 8192 tokens": (SMALL | dict(vocabulary_size=8192), 4, 512, False),
    "large, few tokens": (SMALL | dict(hidden_dim=512), 1, 64, False),
    "large, sLSTM": (SMALL | dict(slstm_at=[1]), 8, 512, False),
    "original": (ORIGINAL, 8, 512, False),
    "original, sLSTM": (ORIGINAL | dict(slstm_at=[0, 1]), 8, 512, False),
    "large, bfloat16": (SMALL | dict(dtype="mixed_bfloat16"), 8, 1024, False),
    "large, bfloat16, remat": (SMALL | dict(dtype="mixed_bfloat16"), 8, 1024, True),
}


def measured(config, batch_size, sequence_length, remat=False):
    """Bytes of a train step, as the framework reports them."""
    with keras.RematScope("full") if remat else nullcontext():
        lm = XLSTMCausalLM(XLSTMBackbone(**config))
    lm.compile("adamw", weighted_metrics=[])
    ids = np.zeros((batch_size, sequence_length), "int32")
    data = {"token_ids": ids, "padding_mask": np.ones_like(ids)}, ids
    lm.optimizer.build(lm.trainable_variables)
    if keras.backend.backend() == "jax":
        return _program(lm, data)
    if keras.backend.backend() != "torch":
        raise SystemExit("This needs KERAS_BACKEND=jax or torch.")
    import torch

    lm.train_on_batch(*data)
    for block in lm.backbone.stack.blocks:
        block.call = _after_collection(block.call)
    lm.optimizer.apply = _after_collection(lm.optimizer.apply)
    with torch.profiler.profile(profile_memory=True) as profile:
        lm.train_on_batch(*data)
    events = [x for x in profile.profiler.kineto_results.events() if x.name() == "[memory]"]
    changes = [x.nbytes() for x in sorted(events, key=lambda x: x.start_ns())]
    kept = sum(x.value.nbytes for x in (*lm.variables, *lm.optimizer.variables))
    return kept + max(itertools.accumulate(changes))


def _after_collection(function):
    @functools.wraps(function)
    def run(*args, **kwargs):
        gc.collect()
        return function(*args, **kwargs)

    return run


def _program(lm, data):
    import jax

    lm._symbolic_build(data_batch=(*data, None))
    parts = lm.trainable_variables, lm.non_trainable_variables
    parts += lm.optimizer.variables, lm.metrics_variables
    state = tuple([v.value for v in variables] for variables in parts)
    program = jax.jit(lm.train_step, donate_argnums=0).lower(state, data).compile()
    memory = program.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def main(names):
    if unknown := set(names) - set(ROWS):
        raise SystemExit(f"No row is called {sorted(unknown)}. There are: {list(ROWS)}.")
    columns = "MB: weights  optimizer  activations   total  reported     off"
    print(f"{'':24} {'rows x steps':>12}  {columns}")
    for name in names or ROWS:
        config, batch_size, sequence_length, remat = ROWS[name]
        told = predict_memory(config, batch_size, sequence_length, remat=remat)
        found = measured(config, batch_size, sequence_length, remat)
        shape = f"{batch_size} x {sequence_length}"
        print(
            f"{name:24} {shape:>12} {told.parameters / 1e6:12.2f} {told.optimizer / 1e6:10.2f} "
            f"{told.activations / 1e6:12.1f} {told.total / 1e6:7.1f} {found / 1e6:9.1f} "
            f"{told.total / found - 1:+7.1%}",
            flush=True,
        )
        keras.backend.clear_session()


if __name__ == "__main__":
    main(sys.argv[1:])
