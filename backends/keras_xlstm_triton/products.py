"""Float32 products on the CPU by oneDNN, where torch would take MKL.

On processors that are not Intel's, MKL does without AVX-512, and oneDNN is about twice as fast. On
Intel's, MKL is the faster one, the more where an operand is transposed. torch asks oneDNN for
batched products only where it is also permitted to round operands to bfloat16. It makes no use of
that without special hardware, which a product shows: there, torch's choice stays.
"""

import contextlib
import functools
import platform
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

setting = torch.backends.mkldnn.matmul
lock, users, before = threading.Lock(), 0, None


@contextlib.contextmanager
def by_onednn():
    """Within, and for products only; the setting is the process's, so that others share it."""
    global users, before
    if torch.compiler.is_compiling() or mkl_is_best() or not is_exact():
        yield
        return
    with lock:
        if not users:
            before = setting.fp32_precision
            setting.fp32_precision = "bf16"
        users += 1
    try:
        yield
    finally:
        with lock:
            users -= 1
            if not users:
                setting.fp32_precision = before


@functools.cache
def mkl_is_best():
    if not torch.backends.mkl.is_available():
        return False
    about = Path("/proc/cpuinfo")  # of the processor, whose maker torch does not tell
    return "GenuineIntel" in (about.read_text() if about.exists() else platform.processor())


@functools.cache
def is_exact():
    """Whether the permission to round is left unused."""
    with ThreadPoolExecutor(1) as thread:  # where no tracing of the caller's sees it
        return thread.submit(_leaves_operands_whole).result()


def _leaves_operands_whole():
    x, before = torch.full((2, 128, 128), 1 + 2.0**-23), setting.fp32_precision
    setting.fp32_precision = "bf16"
    product = x @ torch.eye(128).expand(2, 128, 128)
    setting.fp32_precision = before
    return torch.equal(product, x)
