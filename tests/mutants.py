"""Are the tests able to fail? Changes one place of the numerics at a time, and runs some of them.

python -m tests.mutants            all mutants, in a copy of the tree
python -m tests.mutants slstm      those of files with "slstm" in their path

A mutant is killed when a test fails. Each changes numbers: those that cannot are no mutants. The
tests run once without any, and must pass. One process a backend loads it, and forks for each run.
"""

import multiprocessing
import os
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.__main__ import FAST, QUIET, ROOT

LAYERS, OPS = "keras_xlstm/layers/", "keras_xlstm/ops/"
TORCH, PALLAS = "backends/keras_xlstm_triton/", "backends/keras_xlstm_pallas/"

# File -> pairs of what stands there once and what is put in its place.
MUTANTS = {
    OPS + "mlstm.py": [
        ("s = ops.where(at_reset, ops.maximum(i, log_f), i)", "s = i"),
        ("log_f = ops.where(at_reset, NEVER, log_f)", "pass"),
        ("(ops.where(happens, x, NEVER) for x in (i, s))", "(i, ops.where(happens, s, NEVER))"),
        ("log_f = ops.where(happens, log_f, ops.zeros_like(log_f))", "pass"),
        ("m_new = ops.maximum(m_old, s)", "m_new = m_old"),
        ("    n = a * n + bk\n", "    n = n + bk\n"),
        ("    q = q * q.shape[-1] ** -0.5\n    with", "    q = q * q.shape[-1] ** -1\n    with"),
        ("ops.exp(ops.minimum(-m, MAX_EXPONENT))) + eps", "ops.exp(-m)) + 2 * eps"),
        ("ops.maximum(ops.abs(nq), ops.exp", "ops.maximum(nq, ops.exp"),
        ("i = s = bounded(ops.cast(i", "i = s = (ops.cast(i"),
        ("log_sigmoid(bounded(ops.cast(f", "log_sigmoid((ops.cast(f"),
        ("return 0 in sequence.shape[:2]", "return 0 in sequence.shape[1:2]"),
        ("D = decay + i[..., None, :]", "D = decay + i[..., None]"),
        ("new[..., None] * C_added", "C_added"),
        ("old * n + new * n_added", "n + new * n_added"),
        ("outer = ops.exp(b + m[..., None] - m_t)", "outer = ops.exp(b - m_t)"),
        ("after = ops.arange(L)[:, None] > ops", "after = ops.arange(L)[:, None] >= ops"),
        ("h = ops.where(ops.cast(mask, \"bool\")[:, :, None, None], h, ops.zeros_like(h))", "pass"),
    ],
    OPS + "slstm.py": [
        ("m_new = ops.where(n == 0, i, ops", "m_new = ops.where(n == -1, i, ops"),
        ("c = F * c + I * ops.tanh(z)", "c = F * c + I * z"),
        ("    n = F * n + I\n", "    n = F * n + 1\n"),
        ("h = h * recurrent_scale", "pass"),
        ("    I = ops.exp(i - m_new)", "    I = ops.exp(i)"),
        ("gates = bounded(gates)", "pass"),
    ],
    OPS + "causal_conv.py": [
        ("y = y + tap * kernel[j]", "y = y + tap * kernel[K - 1 - j]"),
        ("reset = ops.take_along_axis(ops.logical_and(reset, mask), order, axis=1)", "pass"),
        ("last = count + ops.arange(K - 1)", "last = count + ops.arange(K - 1) * 0"),
    ],
    OPS + "masks.py": [
        ("ops.cast(mask, \"int32\"), axis=1) - 1, 0)", "ops.cast(mask, \"int32\"), axis=1), 0)"),
    ],
    OPS + "mlstm_chunks.py": [
        ("log_f = ops.maximum(log_f, SHUT)", "pass"),
        ("SHUT = -(2.0**18)", "SHUT = -(2.0**10)"),
        ("coarse = ops.round((log_f - large) * 64) / 64", "coarse = 0 * large"),
        ("return steps[:, None] >= steps[None, :]", "return steps[:, None] > steps[None, :]"),
        ("ops.cast(ops.transpose(up_to(", "ops.cast((up_to("),
        ("dm_t = -eps * along", "dm_t = 0 * along"),
        ("d_nq = ops.where(ops.abs(nq) > w.floor(), -along", "d_nq = ops.where(nq > 0, -along"),
        ("new = dq, dk + dk_end, dv", "new = dq, dk, dv"),
        ("column_sums(d_inside) + d_to_end", "column_sums(d_inside)"),
        ("dm = dm - ops.sum(dC * C_end, (-1, -2))", "dm = dm"),
        ("where(from_l_on, passing, d_to_end[..., None])", "where(from_l_on, passing, 0.0)"),
        ("+ d_between[..., None]", "+ 0 * d_between[..., None]"),
        ("offered = s >= log_f + before", "offered = s <= log_f + before"),
    ],
    OPS + "slstm_loop.py": [
        ("fresh = (0.0, 0.0, 0.0, NEVER)", "fresh = (0.0, 0.0, 0.0, 0.0)"),
        ("h_o=h * (1 - sigmoid_o)", "h_o=h * sigmoid_o"),
        ("c_z=I * (1 - tanh_z**2)", "c_z=I * (1 - tanh_z)"),
        ("h_n=-h / n", "h_n=h / n"),
        ("dh_before = ops.where(cleared, 0.0, dh_before)", "pass"),
        ("later = dh, dc, dn, dm - dc * c[-1] - dn * n[-1]", "later = dh, dc, dn, dm - dc * c[-1]"),
        ("m_end = ops.where(n_end == 0, m_start, m_end)", "pass"),
        ("ops.where(happens, F, 1.0)", "F"),
    ],
    TORCH + "eager_linear.py": [
        ("(factor**3 / -x.shape[1])", "(factor**3 / x.shape[1])"),
        ("mul_(factor).addcmul_(x, along)", "addcmul_(x, along)"),
        ("dy * scale * factor + x * along", "dy * scale * factor"),
        ("d_scale = factor[:, 0] @ both", "d_scale = both.sum(0)"),
    ],
    TORCH + "eager_mlstm.py": [
        ("log_f.clamp(min=SHUT).cumsum(-1)", "log_f.clamp(min=-1e3).cumsum(-1)"),
        ("offered = (s - b).cummax(-1).values", "offered = s - b"),
        ("weights[..., 7, :] *= eps", "pass"),
        ("    dm = dm - inner(dC, C_end) - inner(dn, n_end)\n", "    dm = dm - inner(dC, C_end)\n"),
        ("-nq.sign() * (nq.abs() > gates.floor)", "-nq.sign()"),
        ("before = to_end.cumsum(-1) - to_end", "before = to_end.cumsum(-1)"),
        ("torch.ones(L, L, device=d_inside.device).triu_(1)", "torch.ones(L, L).triu_(0)"),
        ("next_offer[:, 1:], (0, 0, 0, 1)", "next_offer[:, :-1], (0, 0, 1, 0)"),
        ("dz.baddbmm_(y_end, ends)", "pass"),
    ],
    TORCH + "eager_slstm.py": [
        ("states[0, 3].masked_fill_(states[0, 2] == 0, NEVER)", "pass"),
        ("end[3] = torch.where(end[2] == 0, m_start.transpose(0, 1), end[3])", "pass"),
        ("dh.masked_fill_(cleared[t], 0)", "pass"),
        ("dh = torch.where(happens[t], dh, later)", "pass"),
        ("last = (set_by_i * steps).amax(0)", "last = (set_by_i * steps).amin(0)"),
    ],
    TORCH + "mlstm_walk.py": [
        ("happens = step < S - start", "happens = step <= S - start"),
        ("BACK else step[:, None] >= step[None", "BACK else step[:, None] > step[None"),
        ("(from_memory + n[None, :]) * read", "from_memory * read"),
        ("d_gate + tl.load(dlog_f + gate_at)", "d_gate"),
        (" + over_chunk * across", ""),
        ("n = n * over_chunk + tl.sum(c_y.to(tl.float32) * write", "n = n + tl.sum(c_y * write"),
        ("from_memory = (from_memory + n", "from_memory = (0 * from_memory + n"),
    ],
    TORCH + "mlstm_steps.py": [
        ("tl.minimum(chunk * L + L, S) - 1", "tl.minimum(chunk * L + 1, S) - 1"),
        ("over_chunk = tl.exp((g + (m_start -", "over_chunk = tl.exp((g + (m_start +"),
        ("tl.where(chunk == 0, tl.load(m_in + batch * NH + head), m_before)", "m_before"),
        ("f, f_rest = parts(tl.where(happens, f, 0.0))", "f, f_rest = parts(f)"),
        ("memory = memory * tl.load(over + segment) + more", "memory = memory + more"),
        ("tl.store(dm + steps, -eps * along", "tl.store(dm + steps, 0 * along"),
        ("d_nq = tl.where(tl.abs(nq_t) > floor, ", "d_nq = tl.where(tl.abs(nq_t) > 0, "),
        ("passing, passing_rest = offer_1 + f_2", "passing, passing_rest = offer_1 + f_1"),
    ],
    TORCH + "mlstm_update.py": [
        ("happens, more = row < DHQK - start", "happens, more = row < DHQK - start - 1"),
        ("m_t = tl.maximum(m_old, tl.load(s + at))", "m_t = m_old"),
        ("other=0.0) * over + written", "other=0.0) + written"),
        ("column < DHHV", "column < DHHV - 1"),
    ],
    TORCH + "slstm_scan.py": [
        ("h_new, c_new = tl.where(on, h_new, h), tl.where(on, c_new, c)", "pass"),
        ("di = (dc_new * tanh_z + dn_new) * I + dm_i", "di = dc_new * tanh_z * I + dm_i"),
        ("* F + (dm - dm_i)) * tl.sigmoid(-f)", "* F) * tl.sigmoid(-f)"),
        ("dh = dh_rest + (tl.where(clear, 0.0, dh) if RESET else dh)", "dh = dh_rest + dh"),
        ("all * (4 * DH) + e, DH, (e < DH) & (all", "all * (4 * DH) + e, DH, (e < DH - 1) & (all"),
        ("m_new = tl.maximum(i, passing)", "m_new = passing"),
        ("tl.where(on, dm_new, dm), tl.where(on, 0.0, dh)", "dm_new, tl.where(on, 0.0, dh)"),
    ],
    PALLAS + "xla.py": [
        ("jnp.exp(x - largest)", "jnp.exp(x)"),
        ("jnp.log(sums) + largest[..., 0]", "jnp.log(sums)"),
        ("(ids == targets[..., None])", "(ids > targets[..., None])"),
        ("(d_loss[..., None] * off)", "off"),
    ],
    PALLAS + "mlstm_chunk.py": [
        ("jnp.where(t >= j, logarithms", "jnp.where(t > j, logarithms"),
        ("step == len(self.from_start) - 1", "step == 0"),
        ("column_sums(d_inside) + as_row(d_to_end)", "column_sums(d_inside)"),
        ("(total(dC * C) + total(dn * n))", "total(dC * C)"),
        ("+ (read * w.e) * n", "+ 0 * n"),
        ("jnp.maximum(jnp.abs(nq), w.r)", "jnp.abs(nq)"),
    ],
    PALLAS + "mlstm_tpu.py": [
        ("step < self.S - self.chunk", "step < self.S - 1 - self.chunk"),
        ("w = w._replace(e=jnp.where(has_n, w.e, 0.0))", "pass"),
        ("self.chunks - 1 - number if self.back else number", "number"),
    ],
    PALLAS + "mlstm_gpu.py": [
        ("return step < self.launch.S", "return step < self.launch.S - 1"),
        ("jnp.where(t >= l, passing, 0.0)", "jnp.where(t > l, passing, 0.0)"),
        ("+ (read * w.e) * part.row(n, tile)", "+ 0 * part.row(n, tile)"),
        ("to_end + part.row(dn, tile)", "to_end + 0 * part.row(dn, tile)"),
        ("launch.chunks - 1 - number if back else number", "number"),
        (" + jnp.sum(dn * n, -1)", ""),
    ],
    PALLAS + "slstm_walk.py": [
        ("FRESH = 0.0, 0.0, 0.0, NEVER", "FRESH = 0.0, 0.0, 0.0, 0.0"),
        ("di = (dc * tanh_z + dn) * I + dm_i", "di = dc * tanh_z * I + dm_i"),
        ("(dc * c + dn * n) * F + dm)", "(dc * c + dn * n) * F)"),
        ("dh = jnp.where(flag == CLEARED, 0.0, dh)", "pass"),
        ("new = select(flag == MASKED, before[p], new)", "pass"),
        ("h = [x * y for x, y in zip(h, scale, strict=True)]", "pass"),
    ],
    PALLAS + "slstm_gpu.py": [
        ("[x < self.DH for x in columns]", "[x < self.DH - 1 for x in columns]"),
        ("self.S - 1 - k if back else k", "k"),
    ],
    PALLAS + "slstm_tpu.py": [
        ("jnp.minimum(self.steps, self.S - block * self.steps)", "self.steps"),
        ("block = blocks - 1 - block\n        steps", "pass\n        steps"),
    ],
    LAYERS + "recurrent.py": [
        ("x, mask, reset = _backwards(x, mask, reset)", "x = ops.flip(x, axis=1)"),
        ("if 0 in h.shape[:2]:", "if False:"),
        ("h = _hold_output(h, mask)", "pass"),
    ],
    LAYERS + "mlstm.py": [
        ("self.norm(h)", "h"),
        ("kops.sigmoid(self.output_gate(x))", "kops.tanh(self.output_gate(x))"),
    ],
    LAYERS + "mlstm_block.py": [
        ("self.value(u)", "self.value(c)"),
        ("* kops.silu(z)", "* z"),
    ],
    LAYERS + "slstm_block.py": [
        ("self.cell_input(y)", "self.cell_input(c)"),
        ("return x + self.ffn(self.ffn_norm(x))", "return x + self.ffn(x)"),
    ],
}  # fmt: skip


PROPERTIES, EDGES, CONV, OF_LAYERS, OF_BLOCKS = (
    f"tests/test_{name}.py" for name in ("properties", "edges", "causal_conv", "layers", "blocks")
)
MLSTM, SLSTM = ((f"{PROPERTIES} -k {op}", f"{EDGES} -k {op}") for op in ("mlstm", "slstm"))
SLSTM += ("tests/test_slstm.py -k 'scale or fresh'",)
TRITON = "tests/test_triton.py"
WALK = ("tests/test_mlstm.py -k triton", f"{TRITON} -k 'split or on_chip or several'")
OF_PALLAS = "tests/test_pallas"
# What judges a file: the backend, or "triton" interpreted, and arguments for pytest, the likeliest
# killers first.
JUDGES = {
    OPS + "mlstm.py": ("torch", *MLSTM),
    OPS + "slstm.py": ("torch", *SLSTM),
    OPS + "causal_conv.py": ("torch", CONV),
    OPS + "masks.py": ("torch", CONV),
    OPS + "mlstm_chunks.py": ("jax", *MLSTM, "tests/test_mlstm.py -k 'decays and xla'"),
    OPS + "slstm_loop.py": ("jax", *SLSTM),
    TORCH + "eager_linear.py": ("torch", "tests/test_linear.py"),
    TORCH + "eager_mlstm.py": ("torch", *MLSTM),
    TORCH + "eager_slstm.py": ("torch", *SLSTM),
    TORCH + "mlstm_walk.py": ("triton", *WALK),
    TORCH + "mlstm_steps.py": ("triton", *WALK),
    TORCH + "mlstm_update.py": (
        "triton",
        f"{TRITON} -k decode",
        "tests/test_mlstm.py -k 'triton-step'",
    ),
    TORCH + "slstm_scan.py": ("triton", "tests/test_slstm.py -k triton", f"{TRITON} -k slstm"),
    PALLAS + "xla.py": ("jax", "tests/test_linear.py"),
    PALLAS + "mlstm_chunk.py": ("jax", f"{OF_PALLAS}.py -k as_on_a_tpu"),
    PALLAS + "mlstm_tpu.py": ("jax", f"{OF_PALLAS}.py -k as_on_a_tpu"),
    PALLAS + "mlstm_gpu.py": ("jax", f"{OF_PALLAS}.py -k as_on_a_gpu"),
    PALLAS + "slstm_walk.py": ("jax", f"{OF_PALLAS}_slstm.py -k 'as_on_a_gpu or scale'"),
    PALLAS + "slstm_gpu.py": ("jax", f"{OF_PALLAS}_slstm.py -k as_on_a_gpu"),
    PALLAS + "slstm_tpu.py": ("jax", f"{OF_PALLAS}_slstm.py -k as_on_a_tpu"),
    LAYERS + "recurrent.py": (
        "torch",
        OF_LAYERS,
        "tests/test_lstm_contract.py",
        f"{EDGES} -k without_rows",
    ),
    LAYERS + "mlstm.py": ("torch", OF_LAYERS),
    LAYERS + "mlstm_block.py": ("torch", OF_BLOCKS),
    LAYERS + "slstm_block.py": ("torch", OF_BLOCKS),
}
LONGEST = 600  # seconds: what takes longer hangs
fork = multiprocessing.get_context("fork")


def main(names):
    chosen = {
        path: pairs
        for path, pairs in MUTANTS.items()
        if not names or any(name in path for name in names)
    }
    for path, pairs in chosen.items():
        for old, _ in pairs:
            assert (ROOT / path).read_text().count(old) == 1, f"{path}: not once: {old!r}"
    counts = Counter()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        for backend in sorted({JUDGES[path][0] for path in chosen}):
            of_backend = {path: x for path, x in chosen.items() if JUDGES[path][0] == backend}
            counts += apart(judge, tree, backend, of_backend)
    for path, pairs in chosen.items():
        print(f"{counts[path, True]:3} of {len(pairs):2} killed in {path}")
    killed = sum(counts[path, True] for path in chosen)
    print(f"{killed} of {counts.total()} killed")
    return killed == counts.total()


def judge(tree, backend, mutants):
    """Counts of (path, whether killed)."""
    os.environ.update(QUIET | FAST | {"KERAS_BACKEND": backend, "OMP_NUM_THREADS": "1"})
    sys.path[:0] = [str(tree), str(tree / "backends")]  # before the installed package
    if backend == "triton":
        os.environ |= {"KERAS_BACKEND": "torch", "TRITON_INTERPRET": "1"}
    else:
        sys.modules["triton"] = None  # type: ignore[assignment] - as in `conftest.py`
    os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
    for module in ("hypothesis", "keras", "pytest"):
        __import__(module)
    counts = Counter()
    for tests in dict.fromkeys(JUDGES[path][1:] for path in mutants):
        killer = killed_by(tree, tests)
        assert killer is None, f"without a mutant, {killer} fails"
    for path, pairs in mutants.items():
        source = (tree / path).read_text()
        for old, new in pairs:
            (tree / path).write_text(source.replace(old, new))
            killer = killed_by(tree, JUDGES[path][1:])
            counts[path, killer is not None] += 1
            print(f"{killer or 'SURVIVED':60} {path}: {old!r} -> {new!r}", flush=True)
        (tree / path).write_text(source)
    return counts


def killed_by(tree, tests):
    failures = (apart(first_failure, tree, shlex.split(arguments)) for arguments in tests)
    return next((failure for failure in failures if failure), None)


def first_failure(tree, arguments):
    """The first test that fails, or `None`."""
    import pytest

    import keras_xlstm

    assert Path(keras_xlstm.__file__).is_relative_to(tree), keras_xlstm.__file__

    class Watch:
        failed = None

        def pytest_runtest_logreport(self, report):
            if report.failed and self.failed is None:
                self.failed = report.nodeid.removeprefix("tests/")

        pytest_collectreport = pytest_runtest_logreport

    os.chdir(tree)
    watch, nowhere = Watch(), os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    code = pytest.main(["-x", "-p", "no:cacheprovider", *arguments], plugins=[watch])
    return watch.failed or (None if code == 0 else f"pytest ends with {code!r}")


def apart(function, *args):
    """What a function returns, in a process forked from this one."""
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: sender.send(function(*args)))
    process.start()
    sender.close()
    limit = LONGEST if function is first_failure else None
    try:
        return receiver.recv() if receiver.poll(limit) else "it hangs"
    except EOFError:
        return "the process dies"
    finally:
        process.kill()
        process.join()


if __name__ == "__main__":
    sys.exit(0 if main(sys.argv[1:]) else 1)
