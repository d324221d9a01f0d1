"""Notebook 3, Parametrization mechanics: exercises 3.1 to 3.5, in this order, and the quiz."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lora_helpers.course.exercise import (
    Uncheckable,
    Wrong,
    call,
    compare,
    exercise,
    kind_of,
    mentions,
    need_tensor,
    run,
)
from lora_helpers.course.quiz import Quiz, read_quiz
from lora_helpers.lora import LoRAParametrization


def _adapted_layer(rank: int) -> tuple[nn.Linear, torch.Tensor, LoRAParametrization]:
    """A Linear(5, 4) with an adapter that changes it, α = 7: the layer, a copy of its weight, the adapter."""
    layer = nn.Linear(5, 4)
    weight = layer.weight.detach().clone()
    adapter = LoRAParametrization(5, 4, rank, 7)
    nn.init.normal_(adapter.lora_B)
    parametrize.register_parametrization(layer, "weight", adapter)
    return layer, weight, adapter


@exercise(
    hints="""
        Write ΔW first, as in notebook 2, with `self.` before each name.
        The weight stays whole: ΔW is added to it. What should come back when `self.enabled` is False?
        `weight + (self.alpha / self.rank) * (self.lora_B @ self.lora_A)`, or `weight` itself.
    """,
    solution="""
        def forward(self, weight):
            if not self.enabled:
                return weight
            return weight + (self.alpha / self.rank) * (self.lora_B @ self.lora_A)
    """,
    reason="The stored weight comes in, and the effective weight goes out. The stored weight never changes.",
    replies="""
        A and B swapped: A is r × in, B is out × r: which order gives the weight's shape, out × in?
        entry by entry: `*` multiplies two tensors entry by entry. The matrix product is `@`.
        transposed: Your update has the shape in × out. A weight is (out_features, in_features).
        the base changed in place: `+=` writes into the stored weight. Make a new tensor with `+`.
        the update alone: This is ΔW. The weight stays whole, and ΔW is *added* to it.
        scale forgotten: You add BA without the scale α/r.
        α·r for α/r: α is *divided* by the number of directions, r.
        r/α for α/r: The fraction is upside down.
        α for α/r: Your scale is α, not α/r. A real library shipped this bug.
        α//r for α/r: `//` drops the fraction: 7 // 2 is 3. Divide with `/`.
        BA alone: This is BA, without the scale and without the weight.
        no update: The switch is on, but nothing was added. Is the condition the wrong way round?
        subtracted: Add the update. Do not subtract it.
        nothing comes back when off: If `self.enabled` is False, return the weight itself.
        switch ignored: If `self.enabled` is False, the weight itself must come back, bit for bit.
        no gradient reaches B: Do you use `detach()`, `.data` or `no_grad`? Then nothing can be learned.
        a ready-made part: It works. Now work out ΔW and its scale yourself, without `self.delta` and
            `self.scale`.
    """,
)
def forward(function):
    """The forward of the LoRA parametrization."""
    _, weight, adapter = _adapted_layer(rank=2)
    product, alpha, rank = (adapter.lora_B @ adapter.lora_A).detach(), adapter.alpha, adapter.rank
    stored = weight.clone()
    errors = {
        "shapes cannot be multiplied": "A and B swapped",
        "(2) must match the size of tensor b (5)": "entry by entry",
        "(5) must match the size of tensor b (4)": "transposed",
        "(4) must match the size of tensor b (5)": "transposed",
    }
    given = need_tensor(call(function, adapter, stored, errors=errors), "The weight")
    if not torch.equal(stored, weight):
        raise Wrong("the base changed in place")
    mistakes = {
        "the update alone": (alpha / rank) * product,
        "scale forgotten": weight + product,
        "α·r for α/r": weight + alpha * rank * product,
        "r/α for α/r": weight + rank / alpha * product,
        "α for α/r": weight + alpha * product,
        "α//r for α/r": weight + alpha // rank * product,
        "BA alone": product,
        "no update": weight,
        "subtracted": weight - (alpha / rank) * product,
    }
    words = "With α = 7 and r = 2 the answer is W + (7/2)·BA."
    compare(given, weight + (alpha / rank) * product, mistakes, words)
    _check_switch_and_gradient(function, adapter, weight)
    if mentions(function, "delta", "scale"):
        raise Wrong("a ready-made part")
    return "On a real layer its output is right, the switch works, and B receives a gradient."


def _check_switch_and_gradient(function, adapter: LoRAParametrization, weight: torch.Tensor) -> None:
    adapter.enabled = False
    off = run(function, adapter, weight.clone())
    if off is None:
        raise Wrong("nothing comes back when off")
    if not torch.equal(need_tensor(off, "The weight").detach(), weight):
        raise Wrong("switch ignored")
    learned = type("Learned", (LoRAParametrization,), {"forward": function})(5, 4)
    layer = nn.Linear(5, 4)
    parametrize.register_parametrization(layer, "weight", learned)
    layer(torch.randn(3, 5)).sum().backward()
    if learned.lora_B.grad is None:
        raise Wrong("no gradient reaches B")


class _TrapNet(nn.Module):
    # `lora_A_head` has LoRA's name but is a base layer. `gain` is neither a weight nor a bias.
    def __init__(self):
        super().__init__()
        self.linear1, self.lora_A_head = nn.Linear(5, 4), nn.Linear(4, 3)
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.gain * self.lora_A_head(self.linear1(x))


@exercise(
    hints="""
        Freeze everything first, with one call on `net`.
        Then go through `net.modules()` and find the LoRA modules by their class.
        `isinstance(module, LoRAParametrization)`, then `module.requires_grad_(True)`.
    """,
    solution="""
        def freeze(net):
            net.requires_grad_(False)
            for module in net.modules():
                if isinstance(module, LoRAParametrization):
                    module.requires_grad_(True)
    """,
    reason="Any name can contain “lora”. Only LoRA has its class. `requires_grad_` reaches every parameter.",
    replies="""
        layers called by name: The network of this check has other layers than RichBoyNet: go through
            `net.modules()`.
        LoRA frozen too: Nothing is left to train. *After* freezing all, make A and B trainable:
            `isinstance(module, …)` for modules.
        the wrong half frozen: You froze A and B and left the base trainable. Do the opposite.
        base not frozen: Every base parameter still asks for gradients: what in your function freezes them?
            (`net.requires_grad = False`, without the last underscore, sets an attribute that has no effect.)
        found by the text lora: This is the base, in spite of the name `lora_A_head`: look for the class, not
            for a name.
        a parameter overlooked: It is neither a weight nor a bias. First freeze everything, with one call on
            `net`.
        biases not frozen: A bias that is trained changes the base.
    """,
)
def freeze(function):
    """Leave only A and B trainable."""
    net = _TrapNet()
    # A notebook may define its own class LoRAParametrization. Then the learner's function looks for that one.
    kind = getattr(function, "__globals__", {}).get("LoRAParametrization", LoRAParametrization)
    for layer in (net.linear1, net.lora_A_head):
        parametrize.register_parametrization(layer, "weight", kind(layer.in_features, layer.out_features))
    adapters = {id(p) for module in net.modules() if isinstance(module, kind) for p in module.parameters()}
    run(function, net, errors={"'_TrapNet' object has no attribute 'linear": "layers called by name"})
    base = {name: p.requires_grad for name, p in net.named_parameters() if id(p) not in adapters}
    lora = {name: p.requires_grad for name, p in net.named_parameters() if id(p) in adapters}
    loose = [name for name, trainable in base.items() if trainable]
    if not any(lora.values()) and not loose:
        raise Wrong("LoRA frozen too")
    if len(loose) == len(base):
        raise Wrong("base not frozen" if all(lora.values()) else "the wrong half frozen")
    still = f"Still trainable in the base: {', '.join(loose) or 'nothing'}."
    if loose and all(name.startswith("lora_A_head.") for name in loose):
        raise Wrong("found by the text lora", still)
    if loose == ["gain"]:
        raise Wrong("a parameter overlooked", still)
    if loose and all(name == "gain" or name.endswith("bias") for name in loose):
        raise Wrong("biases not frozen", still)
    if loose or not all(lora.values()):
        frozen = ", ".join(name for name, trainable in lora.items() if not trainable)
        raise Wrong(None, f"{still} Frozen in LoRA: {frozen or 'nothing'}.")
    return "The base is frozen, biases too. A and B are free, also in a layer with lora in its name."


@exercise(
    hints="""
        If the `with` is *inside* the loop, how often is the weight computed? The cache ends with it.
        Put the `with` around the whole loop.
    """,
    solution="""
        def outputs(layer, batches):
            with parametrize.cached():
                return [layer(batch) for batch in batches]
    """,
    reason="The cache ends with the block. Around the loop, the weight is computed once; inside, every time.",
    replies="""
        no cache: The outputs are right, but every batch computed the weight: use `parametrize.cached()`.
        the cache ends too soon: Does the `with parametrize.cached():` stand *around* the loop? Inside the
            loop it ends after each batch. PEFT had to move such lines because of memory.
    """,
)
def compute_once(function):
    """Many batches, one computation of the weight."""
    layer, _, adapter = _adapted_layer(rank=3)
    batches = [torch.randn(3, 5) for _ in range(8)]
    expected = [layer(batch).detach() for batch in batches]
    calls = []
    adapter.register_forward_hook(lambda *_: calls.append(1))
    given = call(function, layer, batches)
    asked = f"Return a list of {len(batches)} outputs, one for each batch."
    if not isinstance(given, (list, tuple, torch.Tensor)):
        raise Uncheckable(f"{asked} This is {kind_of(given)}. Square brackets make a list.")
    if len(given) < len(batches):
        raise Uncheckable(f"{asked} Yours has {len(given)}. (A `return` inside a loop ends it.)")
    if len(given) > len(batches):
        advice = "`+=` with a tensor adds its rows one by one; `append` adds it whole."
        raise Uncheckable(f"{asked} Yours has {len(given)}. ({advice})")
    for output, truth in zip(given, expected):
        if not torch.allclose(need_tensor(output, "Each output").detach(), truth, atol=1e-5):
            raise Wrong(None, "An output differs from `layer(batch)`. Is the bias in it?")
    if len(calls) > 1:
        words = f"The weight was computed {len(calls)} times for {len(batches)} batches."
        if len(calls) < len(batches):
            raise Wrong(None, f"{words} Once is enough.")
        raise Wrong("the cache ends too soon" if mentions(function, "cached") else "no cache", words)
    return "Eight batches, one computation of the weight."


@exercise(
    hints="""
        What must the layer's weight be afterwards? What should happen to `layer.parametrizations`?
        `parametrize.remove_parametrizations` can keep the computed weight or go back to the stored one.
        `leave_parametrized=True` keeps the weight that is computed *at that moment*. Must the switch be on or
            off?
    """,
    solution="""
        def merge(layer):
            for lora in layer.parametrizations.weight:
                lora.enabled = True
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    """,
    reason="The computed weight becomes an ordinary parameter. With LoRA off, that would be the base.",
    replies="""
        no weight is left: The layer cannot compute any more. `parametrize.remove_parametrizations` leaves a
            weight.
        added twice: ΔW is in the weight twice: is LoRA still registered, or was it on when you added ΔW?
        still parametrized: `layer.parametrizations` is still there. A merged layer is an ordinary layer.
        scale forgotten in the merge: You merged BA without α/r, so the merged network behaves differently
            from the adapted one. Two real libraries did this.
        the adapter was lost: The base weight came back: `leave_parametrized=False` drops the adapter.
        merged while LoRA was off: This layer came with LoRA off. Then the computed weight *is* the base.
            Switch LoRA on before you merge: the switch is `layer.parametrizations.weight[0].enabled`.
        the update alone: This is ΔW. The merged weight is W + ΔW.
        α·r for α/r: α is *divided* by the number of directions, r.
        α for α/r: The scale is α/r, not α.
        the bias was lost: The weight is right, but the bias is not that of the layer. Keep it.
    """,
)
def merge(function):
    """Turn an adapted layer into an ordinary one that computes the same."""
    for enabled in (True, False):
        layer, weight, adapter = _adapted_layer(rank=3)
        product, alpha, rank = (adapter.lora_B @ adapter.lora_A).detach(), adapter.alpha, adapter.rank
        merged = weight + alpha / rank * product
        x, bias = torch.randn(3, 5), layer.bias.detach().clone()
        adapter.enabled = enabled
        result = run(function, layer)
        layer = result if isinstance(result, nn.Linear) else layer
        if not hasattr(layer, "weight"):
            raise Wrong("no weight is left")
        if parametrize.is_parametrized(layer):
            twice = torch.allclose(layer.parametrizations.weight.original, merged, atol=1e-6)
            raise Wrong("added twice" if twice else "still parametrized")
        mistakes = {
            "scale forgotten in the merge": weight + product,
            "the adapter was lost" if enabled else "merged while LoRA was off": weight,
            "the update alone": alpha / rank * product,
            "α·r for α/r": weight + alpha * rank * product,
            "α for α/r": weight + alpha * product,
            "added twice": merged + alpha / rank * product,
        }
        compare(layer.weight, merged, mistakes, "The merged weight should be W + (α/r)·BA.")
        if not torch.allclose(layer(x), F.linear(x, merged, bias), atol=1e-4):
            raise Wrong("the bias was lost")
    return "One ordinary weight, equal to W + (α/r)·BA, also where LoRA had been switched off."


_STEPS = ("make the optimiser", "add LoRA", "freeze the base", "train")


@exercise(
    hints="""
        An optimiser keeps the parameters that exist when it is made. Which ones must exist by then?
        A and B are made when LoRA is added.
    """,
    solution='order = ["add LoRA", "freeze the base", "make the optimiser", "train"]',
    reason="Add LoRA before you make the optimiser. Freeze before or after adding LoRA, but before training.",
    replies="""
        training without an optimiser: Nothing moved: when `train` came, there was no optimiser yet.
        LoRA added after training: When `train` came, there were no A and B yet. Only the base could learn.
        base not frozen: The base weight moved: it was frozen too late.
        optimiser made too early: B stayed zero: the optimiser was made before A and B existed, so it trains
            neither. Nothing raises an error, and the loss does not fall.
    """,
)
def order(steps):
    """The order in which an experiment must be put together."""
    if not isinstance(steps, (list, tuple)) or not all(isinstance(step, str) for step in steps):
        raise Uncheckable(f"Give a list of texts: the four steps {list(_STEPS)} in an order of your choice.")
    if sorted(steps) != sorted(_STEPS):
        raise Uncheckable(f"Use each of the four steps once, with this spelling: {', '.join(_STEPS)}.")
    if steps.index("train") < steps.index("make the optimiser"):
        raise Wrong("training without an optimiser")
    if steps.index("train") < steps.index("add LoRA"):
        raise Wrong("LoRA added after training")
    base_moved, lora_moved = _run_in_order(steps)
    if base_moved:
        raise Wrong("base not frozen")
    if not lora_moved:
        raise Wrong("optimiser made too early")
    return "In your order, B moved and the base did not."


def _run_in_order(steps: list[str]) -> tuple[bool, bool]:
    """Whether the base weight and B move when a small experiment runs in this order."""
    layer, adapter = nn.Linear(5, 4), LoRAParametrization(5, 4)
    before = layer.weight.detach().clone()
    x, target = torch.randn(8, 5), torch.randn(8, 4)
    for step in steps:
        if step == "add LoRA":
            parametrize.register_parametrization(layer, "weight", adapter)
        elif step == "freeze the base":
            layer.requires_grad_(False)
            adapter.requires_grad_(True)
        elif step == "make the optimiser":
            optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
        else:
            for _ in range(5):
                loss = (layer(x) - target).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return not torch.equal(layer.parametrizations.weight.original, before), bool(adapter.lora_B.any())


def quiz() -> Quiz:
    """The recall quiz of notebook 3."""
    return read_quiz("""
        After registering LoRA on a layer, layer.weight is…
        ✔ computed again at each access: From original, A and B, unless you are inside cached().
        ✘ a stored parameter: The stored one has moved to layer.parametrizations.weight.original.
        ✘ gone: It is still there, but it is computed.

        The base is frozen, and the optimiser was made before add_lora. What happens in training?
        ✘ PyTorch raises an error: It does not. This makes the bug expensive.
        ✘ It works as usual: The optimiser keeps the parameter objects that it was given.
        ✔ Nothing is learned, and nothing raises: It holds frozen parameters, and not A and B.

        LoRA is switched off and you merge with leave_parametrized=True. What is left?
        ✘ W + (α/r)·BA: It keeps only what is computed at that moment. With LoRA off, this is W.
        ✔ the base's weight; the adapter is lost: And no message tells you. merge_lora refuses to do it.
        ✘ an error: PyTorch cannot know that you did not want this.

        You register Scaling on a weight and train. Does .original stay?
        ✘ Yes, originals never change: Only requires_grad_(False) protects it.
        ✔ No, it is trained too, unless frozen: A parametrization by itself freezes nothing.
    """)
