"""Which of a few plans is the fastest: timed once, and kept in a file.

The cost model's plan comes first. The others differ in tiles, and compile without spills too. Each
process asks the file once for a key, so the same call gives the same bits as long as it runs.
`KERAS_XLSTM_CACHE` names another folder, `KERAS_XLSTM_AUTOTUNE=0` leaves it at the model's plan.
"""

import json
import logging
import os
import time
from pathlib import Path

import torch

LONGEST = 120.0  # seconds: later than that no other plan is begun
TALKS_AFTER = 2.0
REPEATS = 3
_chosen: dict[str, int] = {}  # key -> the number of a plan, in this process


def choose(key, plans, run, seconds=None, clock=time.monotonic):
    """One of `plans`, of which the first is the default.

    Args:
        key: string, names what the answer depends on.
        plans: list of lists of numbers, as they stand in the file.
        run: callable, runs a plan; or `None`, where there is nothing to be timed now.
        seconds: callable, what one of a few calls of a function takes. `None` asks the GPU.
        clock: callable, for the limit.
    """
    if not is_on():
        return plans[0]
    if key not in _chosen:
        number = stored(key, plans)
        if number is None and run is not None and len(plans) > 1:
            number = fastest(key, plans, run, seconds or seconds_on_gpu, clock)
            store(key, plans[number])
        _chosen[key] = number or 0
    return plans[_chosen[key]]


def known(key, plans):
    """The plan that `choose` would return without timing any, or `None`."""
    number = _chosen.get(key, stored(key, plans)) if is_on() else 0
    return None if number is None else plans[number]


def is_on():
    return os.environ.get("KERAS_XLSTM_AUTOTUNE", "1").lower() not in ("0", "false", "off", "no")


def fastest(key, plans, run, seconds, clock):
    start, taken = clock(), []
    for plan in plans:
        taken.append(seconds(lambda plan=plan: run(plan)))
        if len(taken) == 1 and clock() - start > TALKS_AFTER:
            logging.getLogger(__name__).warning(
                "keras_xlstm compiles and times %d plans for %s, once; this takes a minute or two. "
                "The result is kept in %s. KERAS_XLSTM_AUTOTUNE=0 switches it off.",
                *(len(plans), key, file()),
            )
        if clock() - start > LONGEST:
            break
    return taken.index(min(taken))


def seconds_on_gpu(run):
    """The best of a few. A plan that lacks memory never ends."""
    try:
        run()  # compiles
        times = []
        for _ in range(REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return min(times)
    except torch.OutOfMemoryError:
        return float("inf")


def file():
    folder = os.environ.get("KERAS_XLSTM_CACHE") or os.path.expanduser("~/.cache/keras_xlstm")
    return Path(folder, "autotune.json")


def entries():
    """What the file holds; nothing, where it cannot be read."""
    try:
        found = json.loads(file().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def stored(key, plans):
    found = entries().get(key)
    return plans.index(found) if found in plans else None


def store(key, plan):
    """Replaces the file in one piece. Where that fails, the next process will time again."""
    path = file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(entries() | {key: plan}, indent=1))
        os.replace(new, path)
    except OSError as error:
        logging.getLogger(__name__).warning("keras_xlstm cannot keep %s: %s", path, error)
