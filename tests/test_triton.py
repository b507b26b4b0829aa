"""The Triton kernels, without a GPU: interpreted, and in the real compilers.

`python -m tests` runs this file, and the conformance suite, with TRITON_INTERPRET=1, which makes
Triton compute on the CPU. `pytest -m gpu` runs the suite on a GPU.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import conformance
import keras
import numpy as np
import pytest
from conformance import BOTH, MLSTM_CASES, OPS, SLSTM_CASES, Case

from keras_xlstm import kernels
from keras_xlstm.ops import mlstm, mlstm_step, slstm

if keras.backend.backend() != "torch":
    pytest.skip("Triton serves torch", allow_module_level=True)
import torch
from keras_xlstm_triton import mlstm as triton_mlstm
from keras_xlstm_triton import slstm as triton_slstm
from keras_xlstm_triton.mlstm_plan import Device, Tiles, plan, split, variants
from torch.fx.experimental.proxy_tensor import make_fx

INTERPRETED = triton_mlstm.interpreted() and importlib.util.find_spec("triton") is not None
interpreted = pytest.mark.skipif(not INTERPRETED, reason="a row of its own in `python -m tests`")
ROOT = Path(__file__).resolve().parents[1]

# Each program of the split form has a segment of the sequence, the last of them a shorter one.
SPLIT = "plain", "mask-all", "i-f-mixed-mask-and-reset", "one-step", "200-steps", "float16"
WIDE = {
    "float32": Case(S=37, mask="holes", reset="some", B=1, NH=2, DHQK=40, DHHV=20),
    "float16": Case(S=70, mask="right", B=1, NH=1, DHQK=72, DHHV=136, dtype="float16"),
}


# The memory of bfloat16 lies on chip; here, that of what the interpreter can multiply does.
ON_CHIP = {"segments": 1, "tiles": (Tiles(32, 16, 8), Tiles(16, 32, 8))}
FORMS = {"split": {"segments": 3}, "on-chip": ON_CHIP, "on-chip-split": ON_CHIP | {"segments": 2}}


@contextlib.contextmanager
def forced(form):
    serve = partial(triton_mlstm.mlstm, **FORMS[form])
    kernels.register(form, serve, triton_mlstm.why_not, priority=-100)
    yield
    kernels._kernels["mlstm"].pop(form)


def check_form(form, case):
    with forced(form) if form in FORMS else contextlib.nullcontext():
        conformance.check_all("mlstm", form, case)


@interpreted
@pytest.mark.parametrize("name", SPLIT)
def test_split(name):
    check_form("split", MLSTM_CASES[name])


@interpreted
@pytest.mark.parametrize("name", SPLIT)
def test_on_chip(name):
    check_form("on-chip", MLSTM_CASES[name])


@interpreted
@pytest.mark.parametrize("form", ["triton", "on-chip", "on-chip-split"])
@pytest.mark.parametrize("dtype", WIDE)
def test_several_tiles_and_slices(dtype, form):
    check_form(form, WIDE[dtype])


# Several tiles each way, the last of them in part.
DECODE = {
    dtype: Case(S=1, eps=0.1, B=1, NH=2, DHQK=150, DHHV=40, dtype=dtype)
    for dtype in ("float32", "float16", "bfloat16")
}
DECODE["wide"] = Case(S=1, mask="full", reset="never", B=1, NH=2, DHQK=5, DHHV=600)


@interpreted
@pytest.mark.parametrize("name", DECODE)
def test_decode_step(name):
    conformance.check_all("mlstm", "triton-step", DECODE[name])


@interpreted
def test_decode_step_traced():
    """As one operator, of q, k and v by strides, and of any layer's step."""
    inputs, state = conformance.mlstm_inputs(DECODE["float32"])
    q, k, v, i, f = (torch.tensor(x, dtype=torch.float32) for x in inputs.values())
    q, k, v = (x.expand(2, *x.shape[1:]).transpose(0, 2).contiguous() for x in (q, k, v))
    i, f = (x.expand(2, -1, 2) for x in (i, f))
    state = [torch.tensor(x, dtype=torch.float32).expand(2, *x.shape[1:]) for x in state.values()]

    def step(*x, kernel="auto"):
        x = *(y.transpose(0, 2) for y in x[:3]), *x[3:]
        h, state = mlstm(*x[:5], initial_state=x[5:], return_state=True, kernel=kernel)
        return h, *state

    inputs = q, k, v, i, f, *state
    with torch.no_grad():
        traced = make_fx(step, tracing_mode="fake")(*inputs)
        expected = step(*inputs, kernel="step")
    assert "keras_xlstm.mlstm_step" in traced.code
    for run in traced, torch.jit.trace(traced, inputs, check_trace=False):
        for x, y in zip(run(*inputs), expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    first = [x.transpose(0, 2)[:, 0] for x in (q, k, v)]
    h, _ = mlstm_step(*first, i[:, 0], f[:, 0], state)
    np.testing.assert_array_equal(h, step(*inputs)[0][:, 0])


@interpreted
def test_walks_traced():
    q, i = torch.randn(1, 20, 2, 16), torch.randn(1, 20, 2)
    with torch.no_grad():
        traced = make_fx(lambda q, i: mlstm(q, q, q, i, i), tracing_mode="fake")(q, i)
        expected = mlstm(q, q, q, i, i)
    assert "keras_xlstm.mlstm_forward" in traced.code
    assert torch.equal(traced(q, i), expected)


@interpreted
def test_strides_of_any_kind():
    """q, k and v of one projection, heads before steps, and a gradient that is one number."""
    case = replace(BOTH, S=20, DHQK=8, DHHV=8)
    inputs, _ = conformance.mlstm_inputs(case)
    q, k, v, i, f = (torch.tensor(x, dtype=torch.float32) for x in inputs.values())
    packed = torch.stack([q, k, v]).permute(1, 3, 2, 0, 4).contiguous().requires_grad_()

    def outputs(kernel):
        q, k, v = packed.transpose(1, 2).unbind(3)
        assert not q.is_contiguous()
        h = mlstm(q, k, v, i, f, kernel=kernel, **case.flags())
        return h, *torch.autograd.grad(h.sum(), packed)

    for ours, theirs in zip(outputs("triton"), outputs("chunkwise"), strict=True):
        np.testing.assert_allclose(ours.detach(), theirs.detach(), rtol=1e-4, atol=1e-5)


# The sLSTM's recurrent weights stay on chip, or come from memory each step. Of the wide cases, a
# second program has the last rows of the batch, and a second tile the last columns.
READ_EACH_STEP = "mask-all", "i-f-mixed-mask-and-reset", "one-step", "float16"
WIDE_SLSTM = {
    "float32": Case(S=3, mask="holes", reset="some", B=18, NH=2, DHHV=72),
    "float16": Case(S=3, mask="holes", reset="some", B=18, NH=1, DHHV=72, dtype="float16"),
}


@pytest.fixture
def slstm_forms():
    """The kernel, made to keep its weights on chip and not to."""
    names = {"on chip": True, "each step": False}
    for name, on_chip in names.items():
        serve = partial(triton_slstm.slstm, on_chip=on_chip)
        kernels.register(name, serve, triton_slstm.why_not, op="slstm", priority=-100)
    yield list(names)
    for name in names:
        kernels._kernels["slstm"].pop(name)


@interpreted
@pytest.mark.parametrize("name", READ_EACH_STEP)
def test_slstm_weights_read_each_step(slstm_forms, name):
    conformance.check_all("slstm", "each step", SLSTM_CASES[name])


@interpreted
@pytest.mark.parametrize("dtype", WIDE_SLSTM)
@pytest.mark.parametrize("form", [0, 1])
def test_slstm_of_many_rows_and_columns(slstm_forms, form, dtype):
    conformance.check_all("slstm", slstm_forms[form], WIDE_SLSTM[dtype])


@interpreted
@pytest.mark.parametrize("form", [0, 1])
def test_slstm_strides_and_recurrent_scale(slstm_forms, form):
    """Gates in an order of their own, a gradient that is one number, and that of the scale."""
    case = Case(S=7, mask="holes", reset="some", DHHV=5)
    inputs, state = conformance.slstm_inputs(case)
    gates, *weights = (torch.tensor(x, dtype=torch.float32) for x in inputs.values())
    state = [torch.tensor(x, dtype=torch.float32) for x in state.values()]
    packed = gates.permute(3, 2, 0, 1, 4).contiguous()
    scale = torch.randn(state[0].shape).round()  # some are 0, as where units are dropped
    tensors = [x.requires_grad_() for x in (packed, *weights, *state, scale)]

    def outputs(kernel):
        packed, recurrent_kernel, bias, *state, scale = tensors
        h = slstm(
            packed.permute(2, 3, 1, 0, 4), recurrent_kernel, bias, initial_state=state,
            recurrent_scale=scale, kernel=kernel, **case.flags(),
        )  # fmt: skip
        return h, *torch.autograd.grad(h.sum(), tensors)

    for ours, theirs in zip(outputs(slstm_forms[form]), outputs("scan"), strict=True):
        np.testing.assert_allclose(ours.detach(), theirs.detach(), rtol=1e-4, atol=1e-5)


@interpreted
@pytest.mark.parametrize("op", OPS)
def test_results_are_the_same_each_time(op):
    case = replace(BOTH, S=25)
    one, two = (conformance.answers.__wrapped__(op, "triton", case) for _ in range(2))
    for x, y in zip((*one[0], *one[1]), (*two[0], *two[1]), strict=True):
        assert torch.equal(x, y)


@interpreted
def test_bfloat16_is_left_to_a_gpu():
    q = torch.zeros(1, 20, 2, 16, dtype=torch.bfloat16)
    i = torch.zeros(1, 20, 2)
    assert "triton: needs a GPU for bfloat16" in kernels.explain(q, q, q, i, i)


def test_explain_tells_form_and_sizes():
    sizes = plan(torch.bfloat16, 8192, 64, 256, 512, Device())
    assert str(sizes) == (
        "fused, in chunks of 64 steps, by 32 values a program, and backward also by 16 keys"
    )
    sizes = plan(torch.bfloat16, 16384, 1, 128, 256, Device(), chunk_size=40)
    assert "split into" in str(sizes) and sizes.L == 64


@pytest.mark.parametrize(
    "dtype, DH, expected",
    [
        ("bfloat16", 128, "kept on chip"),
        ("float16", 128, "kept on chip, and backward read each step, by 64 columns"),
        ("float32", 64, "kept on chip"),
        ("float32", 200, "read each step, by 64 columns"),
    ],
)
def test_explain_tells_where_recurrent_weights_are(dtype, DH, expected):
    gates = torch.zeros(1, 1, 4, 1, DH, dtype=getattr(torch, dtype))
    assert triton_slstm.how(gates) == f"with recurrent weights {expected}"


@pytest.mark.parametrize("chunks", [1, 2, 5, 64, 1000])
@pytest.mark.parametrize("programs", [1, 8, 131, 132, 133, 5000])
def test_segments_fill_the_device(chunks, programs):
    segments = split(chunks, programs, 132)
    assert 1 <= segments <= chunks
    if programs in (132, 5000) or chunks == 1:
        assert segments == 1
    elif chunks >= 64 and programs <= 8:
        assert 16 <= programs * segments <= 132


def test_a_cpu_needs_no_triton():
    code = """
import sys
sys.modules["triton"] = None  # to import it is an error
import keras_xlstm as kx, torch
q = torch.ones(1, 5, 1, 4)
kx.ops.mlstm(q, q, q, q[..., 0], q[..., 0])
print(kx.kernels.explain(q, q, q, q[..., 0], q[..., 0]))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    assert "triton: needs CUDA tensors, received cpu" in result.stdout


@interpreted
@pytest.mark.parametrize(
    "arguments",
    [
        "sm_90 --widths 128x256 64 256",
        "sm_90 --dtypes bfloat16 --widths 40x20 64x64 256x512 512x512",
        "sm_90 --dtypes bfloat16 float32 --widths 96x192 --walks dk --every",
        "sm_80 --widths 128x256 64",
        "sm_100 --widths 128x256 64",
        "gfx942 --widths 128x256 64",
    ],
)
def test_compiles(arguments):
    """No spills on sm_90 and sm_100, no more shared memory than there is, and tensor cores.

    Every kernel, walk, dtype and place of the memory, for every target; widths change no more than
    the numbers of such a program. Without arguments the same command compiles them for more widths,
    and with `--every` all plans that may be timed.
    """
    command = [sys.executable, "examples/benchmarks/kernels.py", "--compile", *arguments.split()]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr


ON_GPU = MLSTM_CASES | DECODE | WIDE | {"bfloat16-wide": replace(WIDE["float16"], dtype="bfloat16")}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu(name):
    """Keras creates tensors on the GPU where there is one."""
    case = ON_GPU[name]
    found = [x for x in conformance.serving("mlstm", case) if x.startswith("triton")]
    assert len(found) == (2 if case.S == 1 else 1)
    for kernel in found:
        conformance.check_all("mlstm", kernel, case)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("DHQK, DHHV", [(64, 64), (128, 256), (256, 512)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_plan_on_a_gpu(dtype, DHQK, DHHV):
    """Those that may be timed, too."""
    case = Case(S=200, mask="right", reset="some", B=1, NH=2, DHQK=DHQK, DHHV=DHHV, dtype=dtype)
    device = Device.of(torch.empty(0, device="cuda"))
    for _, tiles in variants(getattr(torch, dtype), DHQK, DHHV, device):
        FORMS["forced"] = {"segments": 2, "tiles": tiles}
        conformance.answers.cache_clear()
        check_form("forced", case)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", SLSTM_CASES)
def test_slstm_on_a_gpu(name):
    assert "triton" in conformance.serving("slstm", SLSTM_CASES[name])
    conformance.check_all("slstm", "triton", SLSTM_CASES[name])
