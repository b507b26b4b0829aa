"""The public names and their signatures, as `public_api.txt` has them: a change of one is seen.

After a change that is meant: python -m tests.test_public_api
"""

import difflib
import enum
import importlib
import inspect
from pathlib import Path

FILE = Path(__file__).with_name("public_api.txt")
MODULES = ("", ".converters", ".distribution", ".inspect", ".kernels", ".layers", ".models", ".ops")
MODULES += (".utils",)


def public_names(module):
    """What `__all__` lists, or else what is defined in the module without an underscore."""
    own = [name for name, x in vars(module).items() if _is_defined_in(x, module)]
    return sorted(getattr(module, "__all__", own))


def _is_defined_in(x, module):
    if inspect.ismodule(x) or not hasattr(x, "__name__"):
        return False
    return x.__module__ == module.__name__ and not x.__name__.startswith("_")


def described(name, x):
    """Lines: the signature, and of a class its public methods and properties that are ours."""
    if inspect.ismodule(x):
        return [f"{name}: module"]
    if not callable(x):
        return [f"{name}: {type(x).__name__}"]
    lines = [f"{name}{inspect.signature(x)}"]
    if inspect.isclass(x) and not issubclass(x, enum.Enum):
        ours = [base for base in reversed(x.__mro__) if base.__module__.startswith("keras_xlstm")]
        members = {member: value for base in ours for member, value in vars(base).items()}
        for member, value in sorted(members.items()):
            if member.startswith("_"):
                continue
            value = getattr(value, "__func__", value)  # of a class method or static method
            if inspect.isfunction(value):
                lines.append(f"    {name}.{member}{inspect.signature(value)}")
            elif isinstance(value, property):
                lines.append(f"    {name}.{member}")
    return lines


def public_api():
    lines = []
    for suffix in MODULES:
        module = importlib.import_module(f"keras_xlstm{suffix}")
        lines += ["", f"# keras_xlstm{suffix}"]
        for name in public_names(module):
            lines += described(name, getattr(module, name))
    return "\n".join(lines[1:]) + "\n"


def test_the_public_api_is_the_one_on_file():
    listed, found = FILE.read_text("utf-8"), public_api()
    names = (FILE.name, "keras_xlstm")
    diff = difflib.unified_diff(listed.splitlines(), found.splitlines(), *names, lineterm="")
    assert listed == found, "\n".join(
        ["If this is meant, run: python -m tests.test_public_api", *diff]
    )


if __name__ == "__main__":
    FILE.write_text(public_api(), "utf-8")
