import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from keras_xlstm import kernels
from keras_xlstm.distribution import SequenceParallel
from keras_xlstm.ops import (
    causal_conv1d,
    mlstm,
    mlstm_chunkwise,
    mlstm_parallel,
    mlstm_recurrent,
    mlstm_step,
    slstm,
    slstm_step,
)

B, S, NH, DHQK, DHHV = 2, 6, 3, 4, 5
OF_BACKEND = {"jax": "xla", "tensorflow": "xla", "torch": "torch"}[keras.backend.backend()]


@pytest.fixture(autouse=True)
def registrations_end_with_the_test(monkeypatch):
    kernels.available()  # loads the entry points, which happens once
    copies = {op: dict(registered) for op, registered in kernels._kernels.items()}
    monkeypatch.setattr(kernels, "_kernels", copies)
    monkeypatch.setattr(kernels, "_in_use", {})


def zeros(*shape):
    return np.zeros(shape, "float32")


def qkvif(S=S):
    wide = zeros(B, S, NH, DHQK), zeros(B, S, NH, DHQK), zeros(B, S, NH, DHHV)
    return *wide, zeros(B, S, NH), zeros(B, S, NH)


def answers(value):
    """A kernel whose h is `value`, so that a result tells who computed it."""

    def kernel(q, k, v, i, log_f, s, state, *, chunk_size, eps):
        return ops.full_like(ops.cast(v, "float32"), value), state

    return kernel


def refuses(*args, **kwargs):
    return "is on strike"


def breaks(*args, **kwargs):
    raise RuntimeError("a bug in the kernel")


def who(**kwargs):
    return np.unique(ops.convert_to_numpy(mlstm(*qkvif(), **kwargs))).tolist()


def test_the_backend_has_a_kernel_that_is_asked_before_the_plain_forms():
    names = kernels.available()
    assert {"step", OF_BACKEND, "chunkwise", "parallel", "recurrent"} <= set(names)
    assert names.index("step") < names.index(OF_BACKEND)
    assert names.index(OF_BACKEND) < names.index("chunkwise")
    assert names[-1] == "recurrent"
    assert "scan" in kernels.available("slstm")


def test_the_highest_priority_serves():
    kernels.register("seven", answers(7), priority=1000)
    assert kernels.available()[0] == "seven"
    assert who() == [7]
    kernels.register("eight", answers(8), priority=1001)
    kernels.register("nine", answers(9), priority=-1000)
    assert who() == [8]
    assert kernels.available()[:2] == ["eight", "seven"]
    assert kernels.available()[-1] == "nine"
    assert "seven" not in kernels.available("slstm")


def test_a_name_is_registered_once():
    kernels.register("seven", answers(7), priority=1000)
    kernels.register("seven", answers(8), priority=1000)
    assert who() == [8]
    assert kernels.available().count("seven") == 1


def test_an_op_of_each_name_has_its_own_kernels():
    def constant(gates, recurrent_kernel, bias, state, *args):
        return ops.ones_like(gates[:, :, 0]), state

    kernels.register("ones", constant, op="slstm", priority=1000)
    h = slstm(zeros(B, S, 4, NH, DHHV), zeros(NH, DHHV, 4, DHHV), zeros(4, NH, DHHV))
    assert np.all(ops.convert_to_numpy(h) == 1)
    assert "ones" not in kernels.available()


def test_the_next_serves_what_the_best_refuses():
    def odd_only(q, *args, **kwargs):
        return None if q.shape[1] % 2 else f"needs an odd S, received {q.shape[1]}"

    kernels.register("seven", answers(7), odd_only, priority=1001)
    kernels.register("eight", answers(8), priority=1000)
    assert who() == [8]
    assert np.all(ops.convert_to_numpy(mlstm(*qkvif(S=5))) == 7)


def test_kernel_forces_one():
    kernels.register("seven", answers(7), priority=1000)
    kernels.register("eight", answers(8), priority=-1000)
    assert who(kernel="eight") == [8]
    assert who(kernel="recurrent") == [0]


def test_the_forms_are_kernels():
    forms = {"recurrent": mlstm_recurrent, "parallel": mlstm_parallel, "chunkwise": mlstm_chunkwise}
    for value, (name, form) in enumerate(forms.items(), start=7):
        kernels.register(name, answers(value))
        assert np.all(ops.convert_to_numpy(form(*qkvif())) == value)


def test_a_forced_kernel_that_cannot_serve_is_an_error():
    kernels.register("seven", answers(7), refuses)
    with pytest.raises(ValueError, match=r"`seven` is on strike") as error:
        mlstm(*qkvif(), kernel="seven")
    assert 'kernel="auto"' in str(error.value)
    with pytest.raises(ValueError, match=r"`step` needs S = 1, received 6"):
        mlstm(*qkvif(), kernel="step")


def test_a_call_that_no_kernel_can_serve_is_an_error_with_all_reasons(monkeypatch):
    monkeypatch.setitem(kernels._kernels, "mlstm", {})
    kernels.register("seven", answers(7), refuses)
    kernels.register("eight", answers(8), lambda *args, **kwargs: "needs a larger machine")
    with pytest.raises(ValueError, match=r"No kernel can serve") as error:
        mlstm(*qkvif())
    assert "`seven` is on strike" in str(error.value)
    assert "`eight` needs a larger machine" in str(error.value)


@pytest.mark.parametrize("where", ["kernel", "why_not"])
def test_an_error_in_a_kernel_stays_an_error(where):
    run, why_not = (breaks, None) if where == "kernel" else (answers(7), breaks)
    kernels.register("broken", run, why_not, priority=1000)
    with pytest.raises(RuntimeError, match="a bug in the kernel"):
        mlstm(*qkvif())
    with pytest.raises(RuntimeError, match="a bug in the kernel"):
        mlstm(*qkvif(), kernel="broken")


def test_use_forces_inside_its_block():
    kernels.register("seven", answers(7), priority=-1000)
    kernels.register("eight", answers(8), priority=-1000)
    with kernels.use("seven"):
        assert who() == [7]
        assert who(kernel="eight") == [8]  # the argument is nearer to the call
        with kernels.use("eight"):
            assert who() == [8]
        assert who() == [7]
        with kernels.use("auto"):
            assert who() == [0]
        with pytest.raises(RuntimeError), kernels.use("eight"):
            raise RuntimeError
        assert who() == [7]
    assert who() == [0]


def test_use_sets_until_it_is_set_again():
    kernels.register("seven", answers(7), priority=-1000)
    kernels.use("seven")
    assert who() == [7]
    assert kernels.explain(*qkvif()).count("* seven: serves this call") == 1
    kernels.use("auto")
    assert who() == [0]


def test_explain_says_who_serves_and_why_the_others_do_not():
    kernels.register("broken", breaks, refuses, priority=1000)
    kernels.register("seven", breaks, priority=999)  # would break, were it to compute
    lines = kernels.explain(*qkvif(), mask=np.ones((B, S), bool), chunk_size=4).splitlines()
    assert "mlstm" in lines[0] and keras.backend.backend() in lines[0]
    assert lines[1] == "- broken: is on strike"
    assert lines[2] == "* seven: serves this call"
    assert "- step: needs S = 1, received 6" in lines[3:]
    assert len(lines) == 1 + len(kernels.available())
    assert [line for line in lines if line.startswith("*")] == [lines[2]]

    chunkwise = kernels.explain(*qkvif(), chunk_size=4, kernel="chunkwise")
    assert "* chunkwise: serves this call, in chunks of 4 steps" in chunkwise
    forced = kernels.explain(*qkvif(), kernel="recurrent").splitlines()
    assert forced[-1] == f"* recurrent: serves this call, step by step, S = {S}"
    assert "`recurrent` is forced" in forced[2]
    assert "*" not in kernels.explain(*qkvif(), kernel="broken")  # none would serve it


def test_explain_says_how():
    lines = kernels.explain(*qkvif(), chunk_size=4).splitlines()
    (line,) = [line for line in lines if f"* {OF_BACKEND}:" in line]
    assert "in chunks of 4 steps" in line


def test_explain_of_slstm():
    gates = zeros(B, S, 4, NH, DHHV), zeros(NH, DHHV, 4, DHHV), zeros(4, NH, DHHV)
    assert f"* {OF_BACKEND}: serves this call" in kernels.explain(*gates, op="slstm")


# What is called, who serves it here, and how.
CALLS = {
    "plain": ({}, OF_BACKEND, "in chunks of"),
    "no step": ({"S": 0}, None, None),
    "one step": ({"S": 1}, "step", "one step"),
    "any number of steps": ({"S": None}, "chunkwise", "in chunks of 64 steps"),
    "odd sizes": ({"S": 37, "DHQK": 5, "DHHV": 7}, OF_BACKEND, "in chunks of"),
    "wide heads": ({"DHQK": 600, "DHHV": 700}, OF_BACKEND, "in chunks of"),
    "bfloat16": ({"dtype": "bfloat16"}, OF_BACKEND, "in chunks of"),
    "float16": ({"dtype": "float16"}, OF_BACKEND, "in chunks of"),
    "float64": ({"dtype": "float64"}, OF_BACKEND, "in chunks of"),
}
REASONS = "needs .*, .*", "leaves .* to .*", "could serve it, after `.*`", "not asked: .*"


def of_sizes(op, S=20, DHQK=16, DHHV=16, dtype="float32"):
    def tensor(shape, dtype="float32"):
        if None in shape:
            return keras.KerasTensor(shape, "float32")
        return ops.cast(ops.zeros(shape), dtype)

    if op == "slstm":
        gates = tensor((B, S, 4, NH, DHHV), dtype)
        return gates, tensor((NH, DHHV, 4, DHHV)), tensor((4, NH, DHHV))
    wide = (tensor((B, S, NH, width), dtype) for width in (DHQK, DHQK, DHHV))
    return *wide, tensor((B, S, NH)), tensor((B, S, NH))


def verdicts_of(op, args, kernel="auto"):
    """By kernel, whether it serves and what is said of it; and what is said of all."""
    _, *lines = kernels.explain(*args, op=op, kernel=kernel).splitlines()
    found = [re.fullmatch(r"([*-]) ([\w-]+): (.+)", line) for line in lines]
    verdicts = {line[2]: (line[1] == "*", line[3]) for line in found if line}
    assert list(verdicts) == kernels.available(op)
    return verdicts, lines[len(verdicts) :]


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("op", ["mlstm", "slstm"])
@pytest.mark.parametrize("name", CALLS)
def test_explain_of_any_call(name, op, forced):
    """One kernel serves with its form and sizes, and each other has a reason."""
    sizes, server, how = CALLS[name]
    if op == "slstm" and server:
        server = "scan" if sizes.get("S", 0) is None else OF_BACKEND
        how = f"step by step, S = {sizes.get('S', 20)}"
    if forced and server:
        server, how = kernels.available(op)[-1], f"step by step, S = {sizes.get('S', 20)}"
    args = of_sizes(op, **sizes)
    verdicts, more = verdicts_of(op, args, kernel=server if forced else "auto")
    assert not more
    assert [kernel for kernel, (serves, _) in verdicts.items() if serves] == [server] * bool(server)
    for kernel, (serves, verdict) in verdicts.items():
        if serves:
            assert verdict.startswith(f"serves this call, {how}")
        else:
            assert any(re.fullmatch(reason, verdict) for reason in REASONS), (kernel, verdict)
    chosen = kernels.choose(op, server if forced else "auto", *kernels._prepare[op](*args))
    assert (chosen and chosen.name) == server


@pytest.mark.parametrize("op", ["mlstm", "slstm"])
def test_every_kernel_says_how(op):
    for kernel in kernels.available(op):
        verdicts, _ = verdicts_of(op, of_sizes(op, S=1 if "step" in kernel else 20), kernel)
        serves, verdict = verdicts[kernel]
        assert not serves or re.fullmatch("serves this call, .+", verdict), (kernel, verdict)


def test_explain_of_an_error():
    verdicts, more = verdicts_of("mlstm", of_sizes("mlstm"), "step")
    assert verdicts.pop("step") == (False, "needs S = 1, received 20")
    assert {verdict for _, verdict in verdicts.values()} == {"not asked: `step` is forced"}
    assert more == ["! none can serve this call, which is an error"]
    with pytest.raises(ValueError, match=r"`kernel` must be .*kernel='fastest'"):
        kernels.explain(*qkvif(), kernel="fastest")


def test_unknown_names():
    with pytest.raises(ValueError, match=r"`kernel` must be .*recurrent.*kernel='fastest'"):
        mlstm(*qkvif(), kernel="fastest")
    with pytest.raises(ValueError, match=r"`kernel` must be .*kernel='fastest'"):
        kernels.use("fastest")
    with pytest.raises(ValueError, match=r"`kernel` must be .*scan.*kernel='recurrent'"):
        kernels.use("recurrent", op="slstm")
    for function in (kernels.available, lambda op: kernels.register("seven", breaks, op=op)):
        with pytest.raises(ValueError, match=r"`op` must be one of .*'mlstm', .*'slstm', .*'lstm'"):
            function("lstm")


def test_what_a_kernel_receives():
    received = {}

    def spy(q, k, v, i, log_f, s, state, *, chunk_size, eps):
        received.update(q=q, v=v, i=i, log_f=log_f, s=s, C=state[0], rest=(chunk_size, eps))
        return answers(7)(q, k, v, i, log_f, s, state, chunk_size=chunk_size, eps=eps)

    kernels.register("spy", spy, priority=1000)
    inputs = [ops.cast(ops.convert_to_tensor(x), "bfloat16") for x in qkvif()]
    mask = np.arange(S) < np.array([[2], [S]])
    reset = np.tile(np.arange(S) == 1, (B, 1))
    h = mlstm(*inputs, mask=mask, reset=reset, chunk_size=3, eps=0.5)

    dtypes = {
        x: keras.backend.standardize_dtype(y.dtype) for x, y in received.items() if x != "rest"
    }
    assert dtypes == {"q": "bfloat16", "v": "bfloat16"} | dict.fromkeys(
        ["i", "log_f", "s", "C"], "float32"
    )
    assert tuple(received["C"].shape) == (B, NH, DHQK, DHHV)
    assert received["rest"] == (3, 0.5)
    log_f, s = (ops.convert_to_numpy(received[x]) for x in ("log_f", "s"))
    assert np.all(log_f[0, 2:] == 0) and np.all(s[0, 2:] < -1e20)  # masked: kept, nothing added
    assert np.all(log_f[:, 1] < -1e20) and np.all(s[:, 1] == 0)  # reset: nothing kept
    # The kernel answers 7 in float32; around it the dtype is v's, and masked steps are 0.
    assert keras.backend.standardize_dtype(h.dtype) == "bfloat16"
    h = ops.convert_to_numpy(ops.cast(h, "float32"))
    assert np.all(h[0, 2:] == 0) and np.all(h[0, :2] == 7) and np.all(h[1] == 7)


def test_no_kernel_runs_for_an_empty_sequence():
    kernels.register("broken", breaks, priority=1000)
    state = np.ones((B, NH, DHQK, DHHV)), np.ones((B, NH, DHQK)), np.ones((B, NH))
    h, after = mlstm(*qkvif(S=0), initial_state=state, return_state=True)
    assert tuple(h.shape) == (B, 0, NH, DHHV)
    for x, y in zip(state, after, strict=True):
        np.testing.assert_array_equal(x, ops.convert_to_numpy(y))


MLSTM = dict(zip("qkvif", qkvif(), strict=True))
SLSTM = {
    "gates": zeros(B, S, 4, NH, DHHV),
    "recurrent_kernel": zeros(NH, DHHV, 4, DHHV),
    "bias": zeros(4, NH, DHHV),
}
CONV = {"x": zeros(B, S, 7), "kernel": zeros(4, 7), "bias": zeros(7)}
MLSTM_STATE = zeros(B, NH, DHQK, DHHV), zeros(B, NH, DHQK), zeros(B, NH)
SLSTM_STATE = (zeros(B, NH, DHHV),) * 4
BAD = {
    "rank of q": (mlstm, MLSTM, {"q": zeros(B, NH, DHQK)}, r"`q` must have 4 axes"),
    "rank of i": (mlstm, MLSTM, {"i": zeros(B, S, NH, 1)}, r"`i` must have 3 axes"),
    "width of k": (mlstm, MLSTM, {"k": zeros(B, S, NH, DHQK + 1)}, r"`k` .*DHQK"),
    "length of v": (mlstm, MLSTM, {"v": zeros(B, S + 1, NH, DHHV)}, r"`v` .*S is 6"),
    "heads of f": (mlstm, MLSTM, {"f": zeros(B, S, 1)}, r"`f` .*NH is 3"),
    "batch of f": (mlstm, MLSTM, {"f": zeros(1, S, NH)}, r"`f` .*B is 2"),
    "mask transposed": (mlstm, MLSTM, {"mask": np.ones((S, B), bool)}, r"`mask` .*\(B, S\)"),
    "mask of a head": (mlstm, MLSTM, {"mask": np.ones((B, S, NH), bool)}, r"`mask` .*2 axes"),
    "reset of a batch": (mlstm, MLSTM, {"reset": np.ones((B,), bool)}, r"`reset` .*2 axes"),
    "state of slstm": (mlstm, MLSTM, {"initial_state": SLSTM_STATE}, r"tensors C .*4 of them"),
    "state, other width": (
        mlstm,
        MLSTM,
        {"initial_state": (zeros(B, NH, DHHV, DHQK), *MLSTM_STATE[1:])},
        r"`initial_state` .*C.shape",
    ),
    "state, other batch": (
        mlstm,
        MLSTM,
        {"initial_state": tuple(x[:1] for x in MLSTM_STATE)},
        r"`initial_state` .*C.shape",
    ),
    "state in another order": (
        mlstm,
        MLSTM,
        {"initial_state": MLSTM_STATE[::-1]},
        r"`initial_state` .*C.shape",
    ),
    "chunk_size 0": (mlstm, MLSTM, {"chunk_size": 0}, r"`chunk_size` must be a positive integer"),
    "chunk_size -1": (mlstm, MLSTM, {"chunk_size": -1}, r"`chunk_size` must be a pos"),
    "chunk_size 2.5": (mlstm, MLSTM, {"chunk_size": 2.5}, r"`chunk_size` must be a positive int"),
    "chunk_size True": (mlstm, MLSTM, {"chunk_size": True}, r"`chunk_size` must be a positive int"),
    "gates of three": (slstm, SLSTM, {"gates": zeros(B, S, 3, NH, DHHV)}, r"`gates` .*4"),
    "rank of gates": (slstm, SLSTM, {"gates": zeros(B, S, 4, NH * DHHV)}, r"`gates` .*5 axes"),
    "recurrent kernel": (
        slstm,
        SLSTM,
        {"recurrent_kernel": zeros(NH, 4, DHHV, DHHV)},
        r"`recurrent_kernel` must have the shape \(NH, DH, 4, DH\)",
    ),
    "bias": (slstm, SLSTM, {"bias": zeros(4, NH, DHHV + 1)}, r"`bias` .*DH is 5"),
    "slstm mask": (slstm, SLSTM, {"mask": np.ones((B, S + 1), bool)}, r"`mask` .*S is 6"),
    "state of mlstm": (slstm, SLSTM, {"initial_state": MLSTM_STATE}, r"tensors h .*3 of them"),
    "slstm state": (
        slstm,
        SLSTM,
        {"initial_state": (zeros(B, NH, 9),) * 4},
        r"`initial_state` .*h.shape",
    ),
    "rank of x": (causal_conv1d, CONV, {"x": zeros(B, S, 7, 1)}, r"`x` must have 3 axes"),
    "width of the kernel": (causal_conv1d, CONV, {"kernel": zeros(4, 8)}, r"`kernel` .*D is 7"),
    "bias of conv": (causal_conv1d, CONV, {"bias": zeros(4)}, r"`bias` .*D is 7"),
    "mask of conv": (causal_conv1d, CONV, {"mask": np.ones((B, 1), bool)}, r"`mask` .*S is 6"),
    "state of four rows": (
        causal_conv1d,
        CONV,
        {"initial_state": zeros(B, 4, 7)},
        r"`initial_state` .*3.*\(2, 4, 7\)",
    ),
}


@pytest.mark.parametrize("function, good, bad, rule", BAD.values(), ids=BAD.keys())
def test_arguments_that_do_not_fit(function, good, bad, rule):
    function(**good)
    for op in ("mlstm", "slstm"):
        kernels.register("broken", breaks, op=op)
        kernels.use("broken", op)  # an error must come before anything is computed
    with pytest.raises(ValueError, match=rule) as error:
        function(**good | bad)
    assert "Received" in str(error.value)


def test_steps_that_do_not_fit():
    q, k, v, i, f = (x[:, 0] for x in qkvif())
    mlstm_step(q, k, v, i, f, MLSTM_STATE)
    with pytest.raises(ValueError, match="`k`"):
        mlstm_step(q, k[..., 1:], v, i, f, MLSTM_STATE)
    with pytest.raises(ValueError, match="`initial_state` .*m.shape"):
        mlstm_step(q, k, v, i, f, (*MLSTM_STATE[:2], zeros(B, NH + 1)))
    with pytest.raises(ValueError, match="`mask`"):
        mlstm_step(q, k, v, i, f, MLSTM_STATE, mask=np.ones(B + 1, bool))
    gates, *rest = SLSTM.values()
    slstm_step(gates[:, 0], *rest, SLSTM_STATE)
    with pytest.raises(ValueError, match="`gates`"):
        slstm_step(gates[:, 0, :3], *rest, SLSTM_STATE)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="torch.compile")
def test_the_first_call_of_a_process_may_be_compiled():
    code = """
import torch
from keras_xlstm import kernels, ops

wide, gate = torch.ones(1, 8, 2, 4), torch.ones(1, 8, 2)
compiled = torch.compile(ops.mlstm, backend="eager", fullgraph=True)
h = compiled(wide, wide, wide, gate, gate)
assert torch.equal(h, ops.mlstm(wide, wide, wide, gate, gate)), h
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="of the other backends")
def test_sequences_are_split_on_jax_only():
    mesh = keras.distribution.DeviceMesh((1, 1), ("batch", "sequence"), ["cpu:0"])
    with pytest.raises(ValueError, match="needs JAX.*Received: (torch|tensorflow)"):
        SequenceParallel(layout_map=keras.distribution.LayoutMap(mesh))
