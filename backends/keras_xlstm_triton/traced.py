"""Generation without Python's layers: functions of a model, traced once to torch's operations.

For one token, calling a layer costs a hundred times what the layer computes. So a function is
traced, once for each shape of its token ids, and the graph that each call runs is made short:

    operations on weights only     run once a generation: casts, dequantization, LoRA's sums
    products of one row            are split between threads
    changes of shape               become one view, or none
    operations with a number       take it as a tensor, which torch need not convert each time

A trace holds variables, not their values, so it sees what training or loading assigns to them. It
is made anew when the model has other variables, as after `enable_lora` or `quantize`.
"""

import math
import sys
import weakref

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten
ONEDNN = torch.ops.mkldnn._linear_pointwise.default
MOST_TOKENS = 512  # more compute for longer than layers take to call, and take long to trace
SMALLEST_SPLIT = 2**14  # weights; below, one thread reads them faster than two
# model -> its tensors, {function and shape: Trace}
_traces: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def why_not(function, model):
    if model.run_eagerly:
        return "needs a model that is not compiled with `run_eagerly=True`"


def repeated(function, model):
    """A kernel of the operation "repeated", see `keras_xlstm/ops/repeated.py`."""
    tensors = [v.value for v in model.variables]
    traced_with, traces = _traces.get(model, ([], None))
    if [id(x) for x in traced_with] != [id(x) for x in tensors]:
        traces = {}
        _traces[model] = tensors, traces
    weights = {}

    def call(token_ids, cache, *mask):
        if token_ids.numel() > MOST_TOKENS:
            return function(token_ids, cache, *mask)
        key = function.__name__, *token_ids.shape, cache is None, len(mask)
        if key not in weights:
            if key not in traces:
                traces[key] = Trace(function, token_ids, cache, mask)
            weights[key] = traces[key].weights()
        return traces[key](token_ids, cache, mask, weights[key])

    return call


class Trace:
    def __init__(self, function, token_ids, cache, mask):
        def flat(*tensors):
            states = iter(tensors[1 + len(mask) :])
            nested = None if cache is None else [[next(states) for _ in row] for row in cache]
            *outputs, new = function(tensors[0], nested, *tensors[1 : 1 + len(mask)])
            self.sizes = [len(row) for row in new]
            return *outputs, *_flat(new)

        with torch.no_grad():
            make = make_fx(flat, CHEAPER, tracing_mode="fake", _allow_non_fake_inputs=True)
            traced = make(token_ids, *mask, *_flat(cache))
        traced.graph.eliminate_dead_code()
        before, each_time = _shortened(traced.graph)
        self.run_before = GraphModule(traced, before).forward
        self.run = _run(each_time, token_ids, *mask, *_flat(cache), *self.weights())

    def weights(self):
        with torch.inference_mode():
            return self.run_before()

    def __call__(self, token_ids, cache, mask, weights):
        with torch.inference_mode():
            outputs = self.run(token_ids, *mask, *_flat(cache), *weights)
        number = len(outputs) - sum(self.sizes)
        states = iter(outputs[number:])
        return *outputs[:number], [[next(states) for _ in range(size)] for size in self.sizes]


def _flat(cache):
    return [x for row in cache or () for x in row]


def _run(graph, *inputs):
    """A function that runs the graph: in TorchScript, which takes half of Python's time a call."""
    module = GraphModule({}, graph)
    # It cannot name the types of oneDNN's product, and does not know Python 3.14.
    if sys.version_info >= (3, 14) or any(node.target is ONEDNN for node in graph.nodes):
        return module.forward
    with torch.inference_mode():
        return torch.jit.trace(module, inputs, check_trace=False)


# While tracing


def _mm(x, weights):
    """MKL computes the product of one row with one thread, which cannot read as fast as all."""
    threads, (D, N) = torch.get_num_threads(), weights.shape
    if len(x) > 1 or x.device.type != "cpu" or D * N < SMALLEST_SPLIT:
        return NotImplemented
    parts = next(n for n in range(threads, 0, -1) if N % n == 0)
    weights = weights.unflatten(1, (parts, N // parts)).transpose(0, 1)
    return torch.bmm(x.expand(parts, 1, D), weights).view(1, N)


def _mean(x, axes, keepdim=False, *, dtype=None):
    if dtype is not None or x.dtype != torch.float32:
        return NotImplemented
    return x.sum(axes, keepdim) * (1 / math.prod(x.shape[axis] for axis in axes))


def _with_tensor(op):
    def call(x, number, **kwargs):
        if kwargs or type(number) is not float or x.dtype != torch.float32:
            return NotImplemented
        return op(x, torch.full((), number, dtype=x.dtype, device=x.device))

    return call


CHEAPER = {
    aten.mm.default: _mm,
    aten.mean.dim: _mean,
    aten.add.Tensor: _with_tensor(aten.add.Tensor),
    aten.add_.Scalar: _with_tensor(aten.add_.Tensor),
    aten.mul.Tensor: _with_tensor(aten.mul.Tensor),
    aten.mul_.Tensor: _with_tensor(aten.mul_.Tensor),
    aten.div.Tensor: _with_tensor(aten.div.Tensor),
}

# Graphs

RESHAPES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.alias.default,
    aten.detach.default,
}


def _shortened(graph):
    """A graph of what depends on weights only, and one of the rest, which takes its results."""
    fixed = _fixed(graph)
    before, copies = Graph(), {}
    for node in fixed:
        copies[node] = before.node_copy(node, copies.__getitem__)
    results = [x for x in fixed if any(user not in fixed for user in x.users)]
    before.output([copies[x] for x in results])

    after, views = Graph(), {}
    inputs = [x for x in graph.nodes if x.op == "placeholder"] + results
    copies = {x: after.placeholder(x.name) for x in inputs}
    for node in graph.nodes:
        if node not in fixed and node.op != "placeholder":
            copies[node] = _copy(after, node, copies, views)
    # Of views. What else has no use is there to change something in place.
    after.eliminate_dead_code(lambda node: node.target not in ("view", "expand"))
    return before, after


def _fixed(graph):
    """The nodes that give the same for every token, in order."""
    changed = set()  # in place, itself or through a view
    for node in reversed(graph.nodes):
        for user in node.users:
            if node in _written(user) or (user in changed and _is_view(user)):
                changed.add(node)
    fixed = {}
    for node in graph.nodes:
        is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.op == "get_attr" or (
            node.op == "call_function"
            and not (is_random or _written(node) or node in changed)
            and all(x in fixed for x in node.all_input_nodes)
        ):
            fixed[node] = None
    return fixed


def _written(node):
    """The tensors that a node changes."""
    named = dict(zip((x.name for x in _arguments(node)), node.args, strict=False)) | node.kwargs
    return [
        named[x.name]
        for x in _arguments(node)
        if x.alias_info is not None and x.alias_info.is_write and x.name in named
    ]


def _is_view(node):
    return any(x.alias_info is not None for x in _arguments(node))


def _arguments(node):
    return node.target._schema.arguments if isinstance(node.target, torch._ops.OpOverload) else []


def _copy(graph, node, copies, views):
    """Copies a node: a change of shape as one view or nothing, the rest as the cheapest call."""
    root = _root(node)
    if root is not node or node.target is aten.expand.default:
        source = node.args[0] if root is node else root
        shape = tuple(node.meta["val"].shape)
        if shape == tuple(source.meta["val"].shape):
            return copies[source]
        key = copies[source], "expand" if root is node else "view", shape
        if key not in views:
            views[key] = graph.call_method(key[1], (key[0], shape))
        return views[key]
    copy = graph.node_copy(node, copies.__getitem__)
    arguments = _arguments(node)
    is_method = arguments and arguments[0].name == "self" and isinstance(copy.args[0], Node)
    if is_method and not any(x.is_out for x in arguments):
        # A method of a tensor is called at half the cost of an operator.
        name = node.target.overloadpacket.__name__
        if hasattr(torch.Tensor, name):
            copy.op, copy.target = "call_method", name
    return copy


def _root(node):
    """What a node is but for its shape."""
    while node.target in RESHAPES and _keeps_order(node):
        node = node.args[0]
    return node


def _keeps_order(node):
    x, y = node.args[0].meta["val"], node.meta["val"]
    return x.numel() == y.numel() and x.is_contiguous() and y.is_contiguous()
