"""What the Pallas kernels run on.

The default device of JAX. The environment variable `KERAS_XLSTM_PALLAS`, read when a function is
traced, sets another: "tpu" or "gpu" for which a program is compiled ahead of time, or
"interpret-tpu" or "interpret-gpu" to compute the same on a CPU, slowly.
"""

import os
from typing import NamedTuple

import jax

from keras_xlstm_pallas import xla

SETTING = "KERAS_XLSTM_PALLAS"
PLATFORMS = "tpu", "gpu"


class Target(NamedTuple):
    platform: str
    interpreted: bool

    @classmethod
    def of(cls):
        """What a call that is traced now will run on."""
        setting = os.environ.get(SETTING)
        if setting is None:
            return cls(default_platform(), False)
        platform = setting.removeprefix("interpret-")
        if platform not in PLATFORMS:
            known = [*PLATFORMS, *(f"interpret-{x}" for x in PLATFORMS)]
            raise ValueError(f"{SETTING} must be one of {known}. Received: {setting!r}.")
        return cls(platform, platform != setting)

    def __str__(self):
        return f"for a {self.platform.upper()}{', interpreted' if self.interpreted else ''}"


def default_platform():
    device = jax.config.jax_default_device
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def why_not_here(sequence):
    """What rules out Pallas for this, whatever the kernel."""
    if reason := xla.why_not(sequence):
        return reason
    platform = Target.of().platform
    if platform not in PLATFORMS:
        return f"needs a GPU or a TPU, the default device is a {platform.upper()}"
