"""What timm's own tests ask of its models (tests/test_models.py), asked of swapped ones, for everything registered."""

import copy
import io
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from registered import NAMES
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from vit_attn.attention import PATTERNS
from vit_attn.models import create_vit

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 5}
# A class token; registers beside it and LayerScale; no prefix token at all.
MODELS = {
    "vit_tiny_patch16_224": {},
    "vit_base_patch14_reg4_dinov2": {"dynamic_img_size": False},
    "no prefix": {"class_token": False, "global_pool": "avg"},
}
SPECS = [*NAMES, "entmax:learnable_alpha:true+strided"]  # and one with a parameter and a plan of its own
TINY = "vit_tiny_patch16_224"


def build(spec: str, model: str = TINY, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    name = TINY if model == "no prefix" else model
    return create_vit(name, attention=spec, **{**SIZES, **MODELS[model], **kwargs}).eval()


def images(count: int = 2, size: tuple[int, int] = (32, 32), seed: int = 1) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def saved(save: Callable, load: Callable, program: object) -> object:
    stream = io.BytesIO()
    save(program, stream)
    stream.seek(0)
    return load(stream)


def backward_reaches_every_parameter(run: nn.Module, model: nn.Module) -> None:
    model.zero_grad()
    run(images()).square().sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def check_backward(model):
    backward_reaches_every_parameter(model.train(), model)


def check_checkpointing(model):
    wanted = model(images())
    model.set_grad_checkpointing()
    same(model(images()), wanted)
    grads = []
    for enabled in (True, False):
        model.train().set_grad_checkpointing(enabled)
        backward_reaches_every_parameter(model, model)
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def check_features(model):
    out, between = model.forward_intermediates(images(), output_fmt="NCHW")
    assert [tuple(each.shape) for each in between] == [(2, 24, 4, 4)]
    same(out, model.forward_features(images()))
    assert model.forward_head(out, pre_logits=True).shape == (2, 24)


def check_classifier(model):
    model.reset_classifier(0)
    assert model(images()).shape == (2, 24)
    model.reset_classifier(7)
    assert model(images()).shape == (2, 7)


def check_input_size(model):
    wanted = model.blocks[0].attn.tokens().size
    for size in ((64, 64), (32, 64), (32, 32)):
        model.set_input_size(size)
        assert model(images(size=size)).isfinite().all()
    assert model.blocks[0].attn.tokens().size == wanted


def check_half(model):
    for dtype in (torch.float16, torch.bfloat16):
        out = copy.deepcopy(model).to(dtype)(images().to(dtype))
        assert out.dtype == dtype
        assert out.isfinite().all()


def check_double(model):
    wanted = model(images())
    torch.testing.assert_close(model.double()(images().double()).float(), wanted, rtol=0, atol=1e-4)


def check_channels_last(model):
    wanted = model(images())
    model.to(memory_format=torch.channels_last)
    same(model(images().contiguous(memory_format=torch.channels_last)), wanted)


def check_copies(model):
    wanted = model(images())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  # our own
        assert torch.equal(twin(images()), wanted)


def check_fx(model):
    wanted = model(images())
    graph = torch.fx.symbolic_trace(model)
    assert torch.equal(graph(images()), wanted)
    assert torch.equal(torch.jit.script(graph)(images()), wanted)
    backward_reaches_every_parameter(graph, model)
    with pytest.raises(ValueError, match="not taken at call time"):
        graph(images(), torch.ones(17, 17))


def check_feature_extractor(model):
    kwargs = {
        "leaf_modules": get_notrace_modules(),
        "autowrap_functions": get_notrace_functions(),
        "param_shapes_constant": True,
    }
    trained, evaluated = get_graph_node_names(model, tracer_kwargs=kwargs)
    extractor = create_feature_extractor(
        model, train_return_nodes=[trained[-1]], eval_return_nodes=[evaluated[-1]], tracer_kwargs=kwargs
    )
    (out,) = extractor(images()).values()
    assert torch.equal(out, model(images()))


def check_script(model):
    wanted = model(images())
    script = torch.jit.script(model)
    assert torch.equal(script(images()), wanted)
    assert torch.equal(saved(torch.jit.save, torch.jit.load, script)(images()), wanted)
    backward_reaches_every_parameter(script, model)
    with pytest.raises(Exception, match="not taken at call time"):
        script(images(), None, True)


def check_trace(model):
    traced = torch.jit.trace(model, images())
    assert torch.equal(traced(images()), model(images()))
    same(saved(torch.jit.save, torch.jit.load, traced)(images(5, seed=2)), model(images(5, seed=2)))


def check_export(model):
    exported = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    loaded = saved(torch.export.save, torch.export.load, exported)
    for count in (2, 5):
        same(loaded.module()(images(count)), model(images(count)))


def check_strict_export(model):
    same(torch.export.export(model, (images(),), strict=True).module()(images()), model(images()))


def check_compile(model):
    wanted = model(images())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    same(compiled(images()), wanted)
    backward_reaches_every_parameter(compiled, model)
    torch._dynamo.reset()


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}
SHARED = ("backward", "input_size", "fx", "script")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("spec", SPECS)
def test_a_swapped_model_does_what_stock_models_do(spec, check):
    CHECKS[check](build(spec))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", list(MODELS)[1:])
@pytest.mark.parametrize("spec", SPECS)
def test_other_models_do_too(spec, model):
    for check in SHARED:
        CHECKS[check](build(spec, model))


@pytest.mark.parametrize("spec", SPECS)
def test_the_weights_of_a_stock_model_fit(spec):
    stock = timm.create_model(TINY, **SIZES)
    model = build(spec)
    missing, unexpected = model.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected
    assert all(".attn.core." in name for name in missing)
    assert model.state_dict().keys() - set(missing) == stock.state_dict().keys()


# Everything once more in a process in which nothing has run: no plan, no mask, no choice has been made.
COLD = """
    import sys, warnings
    warnings.simplefilter("ignore")
    import torch
    from vit_attn.models import create_vit

    failed = []
    for index, argument in enumerate(sys.argv[1:]):
        spec, implementation = argument.split("/")
        # A grid that the one before did not have, so that nothing of it is there.
        size = 8 * (4 + 2 * (index % 3)), 8 * (4 + 2 * (index // 3 % 3))
        torch._dynamo.reset()
        sizes = {"img_size": size, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 5}
        options = {"implementation": implementation}
        model = create_vit("vit_tiny_patch16_224", attention=spec, attention_options=options, **sizes)
        try:
            x = torch.randn(2, 3, *size)
            out = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
            out.sum().backward()
            torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)
        except Exception as error:
            failed.append(f"{argument}: {type(error).__name__}: {str(error)[:300]}")
    print("\\n".join(failed))
"""


def run_python(code: str, *arguments: str, folder: Path) -> str:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(code))
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_model_compiles_in_one_piece_in_a_process_in_which_nothing_has_run(tmp_path):
    cases = [*(f"{spec}/auto" for spec in SPECS), *(f"entmax15+{name}/blocks" for name in PATTERNS)]
    assert run_python(COLD, *cases, folder=tmp_path).strip() == ""


LOADED = """
    import sys
    import torch
    import vit_attn.attention

    x = torch.load(sys.argv[1], weights_only=True)
    for spec in sys.argv[2:]:
        wanted = torch.load(f"{sys.argv[1]}.{spec}.out", weights_only=True)
        script = torch.jit.load(f"{sys.argv[1]}.{spec}.script")
        exported = torch.export.load(f"{sys.argv[1]}.{spec}.export")
        torch.testing.assert_close(script(x), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(exported.module()(x), wanted, rtol=1e-4, atol=1e-5)
    print("same")
"""


@pytest.mark.filterwarnings("ignore")
def test_saved_programs_mean_the_same_in_another_process(tmp_path):
    torch.save(images(), tmp_path / "x")
    for spec in SPECS:
        model = build(spec, attention_options={"implementation": "blocks"} if spec in PATTERNS else None)
        torch.save(model(images()).detach(), tmp_path / f"x.{spec}.out")
        torch.jit.save(torch.jit.script(model), tmp_path / f"x.{spec}.script")
        torch.export.save(torch.export.export(model, (images(),)), tmp_path / f"x.{spec}.export")
    assert run_python(LOADED, str(tmp_path / "x"), *SPECS, folder=tmp_path).strip() == "same"
