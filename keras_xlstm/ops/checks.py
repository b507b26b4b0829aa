"""Shapes are checked against each other before anything is computed."""


def check_shapes(**named):
    """Checks tensors against layouts whose dimension names are shared.

    Args:
        **named: name of the argument = (tensor or `None`, layout such as `"B S NH DHQK"`).
            Dimensions with one name must agree; a number must be met. Sizes that are not yet
            known agree with everything.

    Raises:
        ValueError: names the first argument that does not fit, and what set the size.
    """
    sizes = {}
    for name, (tensor, layout) in named.items():
        if tensor is None:
            continue
        if not hasattr(tensor, "shape"):
            raise ValueError(f"`{name}` must be a tensor. Received: {type(tensor).__name__}.")
        dims, shape = layout.split(), tuple(tensor.shape)
        problem = f"Received: {name}.shape={shape}."
        if len(dims) != len(shape):
            raise ValueError(f"`{name}` must have {len(dims)} axes, ({', '.join(dims)}). {problem}")
        for dim, size in zip(dims, shape, strict=True):
            known, source = (int(dim), layout) if dim.isdigit() else sizes.get(dim, (None, None))
            if size is None:
                continue
            if known is None:
                sizes[dim] = size, name
            elif known != size:
                rule = f"{dim} is {known} in `{source}`" if not dim.isdigit() else "is fixed"
                raise ValueError(
                    f"`{name}` must have the shape ({', '.join(dims)}), and {rule}. {problem}"
                )


def check_positive_int(**named):
    for name, value in named.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}.")


def check_divides(divisor_name, divisor, name, value):
    if value % divisor:
        fits = [d for d in range(1, value + 1) if value % d == 0]
        raise ValueError(
            f"`{divisor_name}` must divide `{name}`: heads are equally wide. Received: "
            f"{divisor_name}={divisor}, {name}={value}. Divisors of {value}: {fits}."
        )
