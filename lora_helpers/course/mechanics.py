"""Notebook 3, Parametrization mechanics: its exercises and its quiz."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lora_helpers.course.exercise import LearnerError, Uncheckable, Wrong, call, compare, exercise, kind_of, mentions, need_tensor, run
from lora_helpers.course.quiz import Question, Quiz
from lora_helpers.lora import LoRAParametrization


def _adapted_layer(rank: int = 3, alpha: float = 7) -> tuple[nn.Linear, torch.Tensor, LoRAParametrization]:
    """A Linear(5, 4) with an adapter that changes it: the layer, a copy of its weight, the adapter."""
    layer = nn.Linear(5, 4)
    weight = layer.weight.detach().clone()
    adapter = LoRAParametrization(5, 4, rank, alpha)
    nn.init.normal_(adapter.lora_B)
    parametrize.register_parametrization(layer, "weight", adapter)
    return layer, weight, adapter


@exercise(
    hints=(
        "Write ΔW first, as in notebook 2, with `self.` before each name.",
        "The weight stays whole: ΔW is added to it. And what should come back when `self.enabled` is False?",
        "`weight + (self.alpha / self.rank) * (self.lora_B @ self.lora_A)`, or `weight` itself.",
    ),
    solution="""
        def forward(self, weight):
            if not self.enabled:
                return weight
            return weight + (self.alpha / self.rank) * (self.lora_B @ self.lora_A)
    """,
    reason="The stored weight comes in, the effective weight goes out; the stored one is never changed.",
)
def forward(function):
    """The forward of the LoRA parametrization."""
    _, weight, adapter = _adapted_layer(rank=2)
    product, alpha, rank = (adapter.lora_B @ adapter.lora_A).detach(), adapter.alpha, adapter.rank
    stored = weight.clone()
    try:
        given = need_tensor(call(function, adapter, stored), "The weight")
    except LearnerError as error:
        if "shapes cannot be multiplied" in str(error.error):
            raise Wrong("A and B swapped", "A is r × in, B is out × r: only one order gives the weight's shape, out × in.") from None
        if "must match the size" in str(error.error) and "(2) must match the size of tensor b (5)" in str(error.error):
            raise Wrong("entry by entry", "`*` multiplies two tensors entry by entry; the matrix product is `@`.") from None
        if "(5) must match the size of tensor b (4)" in str(error.error) or "(4) must match the size of tensor b (5)" in str(error.error):
            raise Wrong("transposed", "The update has the shape in × out; a weight is (out_features, in_features).") from None
        raise
    if not torch.equal(stored, weight):
        raise Wrong("the base changed in place", "`+=` writes into the stored weight, so the base is lost. Make a new tensor with `+`.")
    compare(
        given,
        weight + (alpha / rank) * product,
        {
            "the update alone": ((alpha / rank) * product, "That is ΔW. The weight stays whole; the update is *added* to it."),
            "scale forgotten": (weight + product, "BA is added, but without the scale α/r."),
            "α·r for α/r": (weight + alpha * rank * product, "α is *shared out* over the r directions: divide."),
            "r/α for α/r": (weight + rank / alpha * product, "The fraction is upside down."),
            "α for α/r": (weight + alpha * product, "The scale is α instead of α/r: a real library shipped this."),
            "α//r for α/r": (weight + alpha // rank * product, "`//` throws the fraction away: 7 // 2 is 3. Divide with `/`."),
            "BA alone": (product, "That is BA, without the scale, and without the weight that it is added to."),
            "no update": (weight, "Nothing was added, though the switch is on. Is the condition the wrong way round?"),
            "subtracted": (weight - (alpha / rank) * product, "The update is added, not taken away."),
        },
        "With α = 7 and r = 2, W + (7/2)·BA is expected.",
    )
    adapter.enabled = False
    off = run(function, adapter, stored)
    if off is None:
        raise Wrong("nothing comes back when off", "With `self.enabled` False your function returns nothing; the weight itself must come back.")
    if not torch.equal(need_tensor(off, "The weight").detach(), weight):
        raise Wrong("switch ignored", "With `self.enabled` False the weight itself must come back, to the bit.")
    adapter.enabled = True
    layer = nn.Linear(5, 4)
    parametrize.register_parametrization(layer, "weight", type("Learned", (LoRAParametrization,), {"forward": function})(5, 4))
    layer(torch.randn(3, 5)).sum().backward()
    if layer.parametrizations.weight[0].lora_B.grad is None:
        raise Wrong("no gradient reaches B", "Is there a `detach()`, `.data` or `no_grad` in it? Then nothing can be learned.")
    return "Registered on a real layer, its output is right, the switch is obeyed and B receives a gradient."


class _TrapNet(nn.Module):
    # `lora_A_head` bears LoRA's name and is a base layer all the same; `gain` is neither a weight nor a bias.
    def __init__(self):
        super().__init__()
        self.linear1, self.lora_A_head = nn.Linear(5, 4), nn.Linear(4, 3)
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.gain * self.lora_A_head(self.linear1(x))


@exercise(
    hints=(
        "Freeze everything first, with one call on `net`.",
        "Then go through `net.modules()` and look for those that are LoRA by their class.",
        "`isinstance(module, LoRAParametrization)`, then `module.requires_grad_(True)`.",
    ),
    solution="""
        def freeze(net):
            net.requires_grad_(False)
            for module in net.modules():
                if isinstance(module, LoRAParametrization):
                    module.requires_grad_(True)
    """,
    reason="A name may bear the text lora by accident; a class may not. `requires_grad_` (with the underscore) reaches every parameter.",
)
def freeze(function):
    """Leave only A and B trainable."""
    net = _TrapNet()
    # A class of the learner's own may stand in the notebook under the same name; then it is the one they look for.
    kind = getattr(function, "__globals__", {}).get("LoRAParametrization", LoRAParametrization)
    for layer in (net.linear1, net.lora_A_head):
        parametrize.register_parametrization(layer, "weight", kind(layer.in_features, layer.out_features))
    adapters = {id(p) for module in net.modules() if isinstance(module, kind) for p in module.parameters()}
    base = {name: p for name, p in net.named_parameters() if id(p) not in adapters}
    lora = {name: p for name, p in net.named_parameters() if id(p) in adapters}
    try:
        run(function, net)
    except LearnerError as error:
        if "_TrapNet" in str(error.error) and "'linear" in str(error.error):
            raise Wrong("layers called by name", "The check's network has other layers than RichBoyNet: go through `net.modules()`.") from None
        raise
    loose = [name for name, p in base.items() if p.requires_grad]
    held = [name for name, p in lora.items() if not p.requires_grad]
    if held and len(held) == len(lora) and not loose:
        raise Wrong("LoRA frozen too", "Nothing is left to train. *After* freezing all, make A and B trainable again: `isinstance(module, …)`, for modules.")
    if held and len(loose) == len(base):
        raise Wrong("the wrong half frozen", "You froze A and B and left the base trainable; it should be the other way round.")
    if len(loose) == len(base):
        raise Wrong(
            "base not frozen",
            "Every base parameter still asks for gradients: what in your function freezes them? (`net.requires_grad = False`, without "
            "the underscore at its end, only sets an attribute that nobody reads.)",
        )
    if loose and all(name.startswith("lora_A_head.") for name in loose):
        raise Wrong(
            "found by the text lora",
            f"The test network has a base layer named `lora_A_head`, which is still trainable ({', '.join(loose)}): look for the class, "
            "not for a text in the name.",
        )
    if loose == ["gain"]:
        raise Wrong(
            "a parameter overlooked",
            "The test network has a parameter `gain`, neither weight nor bias, and it is still trainable. First freeze all, with one call on `net`.",
        )
    if loose and all(name == "gain" or name.endswith("bias") for name in loose):
        raise Wrong("biases not frozen", f"{' and '.join(loose)} would still move, and with them the base.")
    if loose or held:
        raise Wrong(None, f"Still trainable in the base: {', '.join(loose) or 'none'}; frozen in LoRA: {', '.join(held) or 'none'}.")
    return "Base frozen, biases too, A and B free, even in a layer whose name contains lora."


_STEPS = ("make the optimiser", "add LoRA", "freeze the base", "train")


@exercise(
    hints=(
        "An optimiser keeps the parameters that exist when it is made. Which ones must exist by then?",
        "A and B are made when LoRA is added.",
    ),
    solution='order = ["add LoRA", "freeze the base", "make the optimiser", "train"]',
    reason="A and B must exist before the optimiser is made. Freezing may come before or after adding LoRA, but before training.",
)
def order(steps):
    """The order in which an experiment must be put together."""
    if not isinstance(steps, (list, tuple)) or not all(isinstance(step, str) for step in steps):
        raise Uncheckable(f"A list of texts is asked for: the four steps {list(_STEPS)} in an order of your choice.")
    if sorted(steps) != sorted(_STEPS):
        raise Uncheckable(f"Each of the four steps once, please, spelled so: {', '.join(_STEPS)}.")
    layer = nn.Linear(5, 4)
    weight = layer.weight.detach().clone()
    x, target = torch.randn(8, 5), torch.randn(8, 4)
    optimizer = None
    for step in steps:
        if step == "add LoRA":
            parametrize.register_parametrization(layer, "weight", LoRAParametrization(5, 4))
        elif step == "freeze the base":
            layer.requires_grad_(False)
            for module in layer.modules():
                if isinstance(module, LoRAParametrization):
                    module.requires_grad_(True)
        elif step == "make the optimiser":
            optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
        elif optimizer is None:
            raise Wrong("training without an optimiser", "Nothing moved: when `train` came, there was no optimiser yet.")
        else:
            for _ in range(5):
                loss = (layer(x) - target).square().mean()
                optimizer.zero_grad()
                if loss.requires_grad:
                    loss.backward()
                optimizer.step()
    if not parametrize.is_parametrized(layer) or steps.index("train") < steps.index("add LoRA"):
        raise Wrong("LoRA added after training", "Run in your order, A and B were not there yet when `train` came: only the base could have learned.")
    parts = layer.parametrizations.weight
    if not torch.equal(parts.original, weight):
        raise Wrong("base not frozen", "Run in your order, the base weight moved: it was frozen too late.")
    if not parts[0].lora_B.any():
        raise Wrong(
            "optimiser made too early",
            "Run in your order, B stayed zero: the optimiser was made before A and B existed, so it trains only what it knew then. "
            "Nothing raises and the loss stays level.",
        )
    return "Run in your order, B moved and the base did not."


@exercise(
    hints=(
        "What must the layer's weight be afterwards, and what should `layer.parametrizations` be?",
        "`parametrize.remove_parametrizations` can keep the computed weight or go back to the stored one.",
        "With `leave_parametrized=True` it keeps what is computed *at that moment*: so which way must the switch stand?",
    ),
    solution="""
        def merge(layer):
            for lora in layer.parametrizations.weight:
                lora.enabled = True
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    """,
    reason="The computed weight, scale and all, becomes an ordinary parameter; switched on first, so that the adapter is not lost.",
)
def merge(function):
    """Turn an adapted layer into an ordinary one that computes the same."""
    for enabled in (True, False):
        layer, weight, adapter = _adapted_layer()
        product, scale = (adapter.lora_B @ adapter.lora_A).detach(), adapter.alpha / adapter.rank
        x, bias = torch.randn(3, 5), layer.bias.detach().clone()
        adapter.enabled = enabled
        result = run(function, layer)
        layer = result if isinstance(result, nn.Linear) else layer
        if not hasattr(layer, "weight"):
            raise Wrong("no weight is left", "The layer cannot compute any more. `parametrize.remove_parametrizations` leaves a weight behind.")
        if parametrize.is_parametrized(layer):
            given = layer.parametrizations.weight.original.detach()
            if torch.allclose(given, weight + scale * product, atol=1e-6):
                raise Wrong(
                    "added twice",
                    "ΔW is in the stored weight now, but the parametrization is still registered and adds it once more: remove it.",
                )
            raise Wrong("still parametrized", "`layer.parametrizations` is still there; a merged layer is an ordinary one.")
        compare(
            layer.weight,
            weight + scale * product,
            {
                "scale forgotten in the merge": (
                    weight + product, "You merged BA without α/r: the merged network behaves unlike the adapted one. Two real libraries did this."
                ),
                "the adapter was lost": (
                    weight,
                    "The base weight came back: `leave_parametrized=False` throws the adapter away."
                    if enabled else
                    "The layer came with LoRA switched off, and off, the computed weight *is* the base. Switch it on before you merge: the "
                    "switch is `layer.parametrizations.weight[0].enabled`.",
                ),
                "the update alone": (scale * product, "That is ΔW; the merged weight is W + ΔW."),
                "α·r for α/r": (weight + adapter.alpha * adapter.rank * product, "α is *shared out* over the r directions."),
                "α for α/r": (weight + adapter.alpha * product, "The scale is α instead of α/r."),
                "added twice": (weight + 2 * scale * product, "ΔW is in it twice: was LoRA still on when you added it?"),
            },
            "The merged weight should be W + (α/r)·BA.",
        )  # fmt: skip
        if not torch.allclose(layer(x), F.linear(x, weight + scale * product, bias), atol=1e-4):
            raise Wrong("the bias was lost", "The weight is right, but the outputs are not those of the adapted layer: its bias belongs to it.")
    return "One ordinary weight, equal to W + (α/r)·BA, also where LoRA had been switched off."


@exercise(
    hints=(
        "How often is the weight computed if the `with` stands *inside* the loop? The cache lives as long as the block.",
        "Put the `with` around the whole loop.",
    ),
    solution="""
        def outputs(layer, batches):
            with parametrize.cached():
                return [layer(batch) for batch in batches]
    """,
    reason="The cache is dropped at the end of the `with`: around the loop the weight is computed once, inside it once for each batch.",
)
def compute_once(function):
    """Many batches, one computation of the weight."""
    layer, _, adapter = _adapted_layer()
    batches = [torch.randn(3, 5) for _ in range(8)]
    expected = [layer(batch).detach() for batch in batches]
    calls = []
    adapter.register_forward_hook(lambda *_: calls.append(1))
    given = call(function, layer, batches)
    asked = f"A list of {len(batches)} outputs is asked for, one for each batch"
    if not isinstance(given, (list, tuple, torch.Tensor)):
        raise Uncheckable(f"{asked}; this is {kind_of(given)}. Square brackets make a list.")
    if len(given) != len(batches):
        few, many = "A `return` inside a loop ends it.", "`+=` with a tensor adds its rows one by one; `append` adds it whole."
        raise Uncheckable(f"{asked}; yours has {len(given)}. ({few if len(given) < len(batches) else many})")
    for output, truth in zip(given, expected):
        if not torch.allclose(need_tensor(output, "Each output").detach(), truth, atol=1e-5):
            raise Wrong(None, "An output differs from `layer(batch)`: is the bias in it?")
    if len(calls) == len(batches) and not mentions(function, "cached"):
        raise Wrong("no cache", "The outputs are right, but the weight was computed for each batch: `parametrize.cached()` is not in your function.")
    if len(calls) == len(batches):
        raise Wrong(
            "the cache ends too soon",
            f"The weight was computed {len(calls)} times for {len(batches)} batches. Does the `with parametrize.cached():` "
            "stand *around* the loop, brackets and all? Inside, it is dropped after each batch: PEFT had to move such lines, for memory.",
        )
    if len(calls) > 1:
        raise Wrong(None, f"The weight was computed {len(calls)} times; once is enough.")
    return "Eight batches, one computation of the weight."


def quiz() -> Quiz:
    """The recall quiz of notebook 3."""
    return Quiz((
        Question(
            "After registering LoRA on a layer, layer.weight is…",
            "computed anew at each access",
            {
                "computed anew at each access": "From original, A and B; unless you are inside cached().",
                "a stored parameter": "The stored one has moved to layer.parametrizations.weight.original.",
                "gone": "It is still there, but computed.",
            },
        ),
        Question(
            "The base is frozen, and the optimiser was made before add_lora. What happens in training?",
            "Nothing is learned, and nothing raises",
            {
                "PyTorch raises an error": "It does not, which is what makes this bug expensive.",
                "It works as usual": "It keeps the parameter objects that it was given.",
                "Nothing is learned, and nothing raises": "It holds the old parameters, which are frozen; it has never heard of A and B.",
            },
        ),
        Question(
            "LoRA is switched off and you merge with leave_parametrized=True. What is left?",
            "the base's weight; the adapter is lost",
            {
                "W + (α/r)·BA": "Only what is *computed at that moment* is kept, and off, that is W.",
                "the base's weight; the adapter is lost": "Without a word. merge_lora refuses it.",
                "an error": "PyTorch cannot know that it was not meant.",
            },
        ),
        Question(
            "You register Scaling on a weight and train. Does .original stay?",
            "No, it is trained too, unless frozen",
            {
                "Yes, originals never change": "Nothing protects it but requires_grad_(False).",
                "No, it is trained too, unless frozen": "A parametrization freezes nothing by itself.",
            },
        ),
    ))  # fmt: skip
