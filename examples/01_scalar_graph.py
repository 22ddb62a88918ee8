"""Build a graph, differentiate it, and draw it.

    python examples/01_scalar_graph.py
"""

from autograd import Tensor, grad, tanh


def neuron(x, w, b):
    """One neuron: tanh(x·w + b)."""
    return tanh(x * w + b)


def draw(tensor: Tensor, names: dict[int, str], indent: str = "") -> None:
    """Print the graph below a tensor, the newest operator first."""
    stack = [((tensor.node, tensor.index), indent)]
    while stack:
        parent, indent = stack.pop()
        if parent is None:
            print(f"{indent}constant")
        elif isinstance(parent, Tensor):
            print(f"{indent}{names.get(id(parent), 'leaf')} = {parent.item():.4f}")
        else:
            node = parent[0]
            print(f"{indent}{node.op.name}")
            stack += [(p, indent + "    ") for p in reversed(node.parents)]


x, w, b = (Tensor(v, requires_grad=True) for v in (0.5, -1.2, 0.3))
y = neuron(x, w, b)
print(f"y = {y.item():.6f}")
draw(y, {id(x): "x", id(w): "w", id(b): "b"})

y.backward()
for name, t in (("x", x), ("w", w), ("b", b)):
    print(f"dy/d{name} = {t.grad.item():+.6f}")

slope = grad(neuron)
curvature = grad(grad(neuron))
print(f"again, as functions: dy/dx = {slope(0.5, -1.2, 0.3).item():+.6f}, d²y/dx² = {curvature(0.5, -1.2, 0.3).item():+.6f}")

h = 1e-6
difference = (neuron(Tensor(0.5 + h), -1.2, 0.3).item() - neuron(Tensor(0.5 - h), -1.2, 0.3).item()) / (2 * h)
assert abs(difference - x.grad.item()) < 1e-8
print("a finite difference agrees")
