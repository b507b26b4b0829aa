"""Decoding without Python's layers: a model's step, traced once to torch's own operations.

For one token, calling a layer costs a hundred times what the layer computes. The step is traced
once for each batch size, and three kinds of operations leave the graph that each token runs:

    of weights only          run once a generation: casts, dequantization, LoRA's sums
    changes of shape         become one view, or none
    without use              are dropped

A trace holds variables, not their values, so it sees what training or loading assigns to them. It
is made anew when the model has other variables, as after `enable_lora` or `quantize`.
"""

import weakref

import torch
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten
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
SMALLEST_SPLIT = 2**14
_steps = weakref.WeakKeyDictionary()  # model -> its tensors, {shape of token ids: TracedStep}


def why_not(model):
    if model.run_eagerly:
        return "needs a model that is not compiled with `run_eagerly=True`"


def decoder(model):
    """A kernel of the operation "decode", see `keras_xlstm/ops/decode.py`."""
    tensors = [v.value for v in model.variables]
    traced_with, steps = _steps.get(model, ([], None))
    if [id(x) for x in traced_with] != [id(x) for x in tensors]:
        steps = {}
        _steps[model] = tensors, steps
    weights = {}

    def step(token_ids, cache):
        key = *token_ids.shape, token_ids.dtype
        if key not in weights:
            if key not in steps:
                steps[key] = TracedStep(model, token_ids, cache)
            weights[key] = steps[key].weights()
        return steps[key](token_ids, cache, weights[key])

    return step


class TracedStep:
    def __init__(self, model, token_ids, cache):
        self.sizes = [len(state) for state in cache]

        def step(token_ids, *states):
            logits, hidden_states, cache = model.call_with_cache(token_ids, self._nested(states))
            return logits, hidden_states, *_flat(cache)

        with torch.no_grad():
            traced = make_fx(step, {aten.mm.default: mm})(token_ids, *_flat(cache))
        traced.graph.eliminate_dead_code()
        before, each_time = _split(traced.graph)
        self.weights = GraphModule(traced, before).forward
        self.run = GraphModule({}, each_time).forward

    def __call__(self, token_ids, cache, weights):
        logits, hidden_states, *states = self.run(token_ids, *_flat(cache), *weights)
        return logits, hidden_states, self._nested(states)

    def _nested(self, states):
        states = iter(states)
        return [[next(states) for _ in range(size)] for size in self.sizes]


def mm(x, weights):
    """Splits the product of one row on a CPU between threads, which MKL does not."""
    parts, (D, N) = torch.get_num_threads(), weights.shape
    if len(x) > 1 or x.device.type != "cpu" or N % parts or D * N < SMALLEST_SPLIT:
        return NotImplemented
    weights = weights.unflatten(1, (parts, N // parts)).transpose(0, 1)
    return torch.bmm(x.expand(parts, 1, D), weights).view(1, N)


def _flat(cache):
    return [x for state in cache for x in state]


def _split(graph):
    """A graph of what depends on weights only, and one of the rest, which takes its results."""
    fixed = _fixed(graph)
    before, after, copies = Graph(), Graph(), {}
    for node in graph.nodes:
        if node in fixed:
            copies[node] = before.node_copy(node, copies.__getitem__)
    results = [x for x in fixed if any(user not in fixed for user in x.users)]
    before.output([copies[x] for x in results])

    copies = {x: after.placeholder(x.name) for x in graph.nodes if x.op == "placeholder"}
    copies |= {x: after.placeholder(x.name) for x in results}
    views = {}
    for node in graph.nodes:
        if node not in fixed and node.op != "placeholder":
            copies[node] = _copy_short(after, node, copies, views)
    after.eliminate_dead_code()  # what only served changes of shape
    return before, after


def _fixed(graph):
    """The nodes that give the same for every token."""
    changed = set()  # in place, itself or through a view
    for node in reversed(graph.nodes):
        if any(_is_in_place(x) or x in changed and x.target in RESHAPES for x in node.users):
            changed.add(node)
    fixed = {}  # a set in order
    for node in graph.nodes:
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.op == "get_attr" or (
            node.op == "call_function"
            and not random
            and node not in changed
            and not _is_in_place(node)
            and all(x in fixed for x in node.all_input_nodes)
        ):
            fixed[node] = None
    return fixed


def _is_in_place(node):
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _copy_short(graph, node, copies, views):
    """Copies a node: a change of shape as a view or nothing, the rest in its cheapest form.

    Methods of tensors are called at half the cost of operators.
    """
    root = node
    while root.target in RESHAPES and _is_whole(root):
        root = root.args[0]
    if root is not node:
        shape = list(node.meta["val"].shape)
        if shape == list(root.meta["val"].shape):
            return copies[root]
        key = root, *shape
        if key not in views:
            views[key] = graph.call_method("view", (copies[root], shape))
        return views[key]
    copy = graph.node_copy(node, copies.__getitem__)
    if isinstance(node.target, torch._ops.OpOverload):
        name, arguments = node.target.overloadpacket.__name__, node.target._schema.arguments
        if arguments and arguments[0].name == "self" and hasattr(torch.Tensor, name):
            copy.op, copy.target = "call_method", name
    return copy


def _is_whole(node):
    """Whether a change of shape keeps all elements in their order."""
    x, y = node.args[0].meta.get("val"), node.meta["val"]
    return x is not None and x.numel() == y.numel() and x.is_contiguous() and y.is_contiguous()
