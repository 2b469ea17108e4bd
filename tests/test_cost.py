"""Cost against torch's own counter and against sums worked out by hand; memory to the byte."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vit_attn.cost import environment, model_cost, peak_memory
from vit_attn.models import create_vit

DIM, DEPTH, HIDDEN, CLASSES, PATCH, SIDE = 32, 2, 128, 10, 4, 32
CPU = torch.device("cpu")
GRID = (SIDE // PATCH) ** 2  # 64 patches
TOKENS = GRID + 1


def tiny(attention, **kwargs):
    sizes = {"img_size": SIDE, "patch_size": PATCH, "num_classes": CLASSES}
    return create_vit(
        "vit_tiny_patch16_224", attention=attention, embed_dim=DIM, depth=DEPTH, num_heads=2, **sizes, **kwargs
    )


def flops_by_hand(attention_share=1.0):
    """Two operations per multiplication and addition, layer by layer; norms, activations and sums are not counted."""
    embed = 2 * GRID * 3 * PATCH**2 * DIM
    linear = 2 * TOKENS * DIM * (3 * DIM + DIM + 2 * HIDDEN)  # qkv, proj, and both of the MLP
    products = 2 * (2 * TOKENS**2 * DIM)  # q kᵀ and weights v
    return embed + DEPTH * (linear + products * attention_share) + 2 * DIM * CLASSES


@pytest.mark.parametrize("attention", ["softmax", "entmax15", "strided", ["strided", "full"]])
def test_flops_are_those_of_the_dense_computation_by_counter_and_by_hand(attention):
    net = tiny(attention)
    with FlopCounterMode(display=False) as counter:
        tiny(attention, attention_options={"implementation": "dense"})(torch.rand(1, 3, SIDE, SIDE))
    cost = model_cost(net, SIDE)
    assert cost["flops"] == counter.get_total_flops() == flops_by_hand()
    assert cost["attention_flops"] == DEPTH * 4 * TOKENS**2 * DIM
    assert cost["parameters"] == sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize(("attention", "options"), [("sparsemax+fixed", {}), ("fixed", {"implementation": "blocks"})])
def test_flops_of_blocks_are_those_of_the_scores_that_they_compute(attention, options):
    net = tiny(attention, attention_options=options)
    # Every patch is scored against its row of 8, the ends of all 8 rows and the class token; that one against all.
    scores = GRID * (8 + 8 + 1) + TOKENS
    cost = model_cost(net, SIDE)
    with FlopCounterMode(display=False) as counter:
        net.eval()(torch.rand(1, 3, SIDE, SIDE))
    assert cost["flops"] == counter.get_total_flops() == flops_by_hand(scores / TOKENS**2)
    assert cost["attention_flops"] == DEPTH * 4 * scores * DIM
    assert cost["flops_by_entries"] == round(flops_by_hand(cost["entries"][0] / TOKENS**2))
    assert all("(blocks)" in layer for layer in cost["layers"])


def allowed_by_hand():
    """Entries of `strided` on an 8 x 8 grid behind a class token: query i sees itself, 8 before, and its column."""
    count = 2 * TOKENS - 1  # the class token's row and column
    for i in range(GRID):
        count += sum(1 for j in range(i + 1) if i - j <= 8 or (i - j) % 8 == 0)
    return count


def test_flops_by_entries_count_the_allowed_entries_alone():
    cost = model_cost(tiny("strided"), SIDE)
    allowed = allowed_by_hand()
    assert cost["entries"] == [allowed, allowed]
    assert cost["sparsity"] == pytest.approx([1 - allowed / TOKENS**2] * 2)
    assert cost["flops_by_entries"] == round(flops_by_hand(allowed / TOKENS**2))


def test_flops_by_entries_of_full_attention_are_all_flops():
    cost = model_cost(tiny("entmax15"), SIDE)
    assert (cost["entries"], cost["sparsity"]) == ([TOKENS**2] * 2, [0.0, 0.0])
    assert cost["flops_by_entries"] == cost["flops"]


def test_layers_are_named_one_by_one_with_what_computes_them():
    assert model_cost(tiny(["entmax+strided", "full"]), SIDE)["layers"] == [
        "entmax+strided (dense)",
        "softmax+full (fused)",
    ]


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_the_model_as_it_was(training):
    net = tiny("softmax", drop_rate=0.5).train(training)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model_cost(net, SIDE)
    assert net.training is training
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_environment_names_versions_and_machine():
    seen = environment()
    assert seen["torch"] == torch.__version__.split("+")[0] or seen["torch"] == torch.__version__
    assert {"python", "platform", "cpu_count", "gpus", "lightning", "timm", "vit_attn"} <= seen.keys()


def floats(count):
    return torch.empty(count, dtype=torch.float32)


def test_peak_memory_by_hand():
    def three_of_which_one_is_freed():
        a = floats(100_000)
        b = floats(200_000)
        del a
        c = floats(50_000)
        return b, c

    assert peak_memory(three_of_which_one_is_freed, CPU) == 4 * 300_000  # a and b; b and c are less
    assert peak_memory(lambda: [floats(1_000) for _ in range(7)], CPU) == 4 * 7_000


def test_peak_memory_is_beyond_what_was_held_before():
    held = floats(1_000_000)
    assert peak_memory(lambda: held[:10].sum(), CPU) < 1_000
    assert peak_memory(lambda: None, CPU) == 0


def test_peak_memory_counts_backward_passes_and_what_operators_allocate_inside():
    x = torch.randn(100_000, requires_grad=True)
    # exp saves its result; its gradient is one more, and grad of the sum an expanded scalar.
    peak = peak_memory(lambda: torch.autograd.grad(x.exp().sum(), x), CPU)
    assert 2 * x.nbytes <= peak < 2.1 * x.nbytes


def test_peak_memory_counts_custom_operators():
    @torch.library.custom_op("vit_attn_bench_tests::wasteful", mutates_args=())
    def wasteful(x: torch.Tensor) -> torch.Tensor:
        scratch = torch.zeros(3 * x.numel())
        return x + scratch[0]

    x = torch.randn(100_000)
    assert peak_memory(lambda: wasteful(x), CPU) == 4 * x.nbytes  # scratch and result


def test_peak_memory_counts_compiled_code():
    # A view of the input would be free: the sum over dim 0 needs all of the exponentials of a second use.
    compiled = torch.compile(lambda x: torch.cumsum(x.exp(), 0).sum(0))
    x = torch.randn(400, 250)
    compiled(x)
    assert peak_memory(lambda: compiled(x), CPU) >= x.nbytes
