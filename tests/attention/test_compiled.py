"""The compiled kernels give what the plain lines give, and whole models compile in one piece."""

import logging
import shutil

import pytest
import torch
from torch import Tensor

from vit_attn.attention import attention, make_pattern
from vit_attn.attention import compiled as compiling
from vit_attn.attention.engine import run as engine_run
from vit_attn.attention.normalizers import NORMALIZERS

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="torch.compile needs a C++ compiler"
)
LAID = {
    "strided": make_pattern("strided", num_tokens=36, num_prefix_tokens=1, window=5, stride=6),
    "window": make_pattern("sliding_window", num_tokens=36, window=6),
    "fixed": make_pattern("fixed", num_tokens=36, num_prefix_tokens=1, window=6),
    "full": make_pattern("full", num_tokens=36, num_prefix_tokens=1),
}
# Seconds each: the others run with `pytest -m slow`.
QUICK = {("entmax", "strided"), ("softmax", "fixed"), ("entmax15", "full"), ("sparsemax", "window")}
CASES = [
    pytest.param(normalizer, name, marks=[] if (normalizer, name) in QUICK else pytest.mark.slow)
    for normalizer in NORMALIZERS
    for name in LAID
]


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    monkeypatch.setattr(compiling, "_works", True)
    yield
    torch._dynamo.reset()


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(normalizer: str, name: str) -> list[Tensor]:
    """Outputs and gradients."""
    pattern = LAID[name]
    leaves = [draw(2, 3, pattern.size, 4, seed=seed).requires_grad_() for seed in range(3)]
    alpha = torch.tensor([1.2, 1.5, 1.9], requires_grad=True)
    out = attention(*leaves, normalizer, pattern, alpha, implementation="blocks")
    wanted = [*leaves, alpha] if normalizer == "entmax" else leaves
    return [out, *torch.autograd.grad((out * draw(*out.shape, seed=9)).sum(), wanted)]


@needs_compiler
@pytest.mark.parametrize(("normalizer", "name"), CASES)
def test_compiled_kernels_give_what_the_plain_lines_give(monkeypatch, caplog, normalizer, name):
    monkeypatch.setattr(engine_run, "_CHUNK_ENTRIES", 2**13)  # several chunks, so that what is kept has offsets
    monkeypatch.setattr(compiling, "COMPILE_FROM", float("inf"))
    wanted = run(normalizer, name)
    monkeypatch.setattr(compiling, "COMPILE_FROM", 0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    results = run(normalizer, name)
    again = run(normalizer, name)
    if (normalizer, name) != ("softmax", "full"):  # torch's own kernel, and a gradient of few lines
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert compiling._works, caplog.text
    assert not [record for record in caplog.records if record.name.startswith("vit_attn")]
    for result, repeated, value in zip(results, again, wanted, strict=True):
        torch.testing.assert_close(result, value, atol=1e-5 * float(value.detach().abs().max()), rtol=0)
        torch.testing.assert_close(repeated, result, atol=0, rtol=0)


def failing(monkeypatch, error: Exception) -> tuple[object, list[int]]:
    """A kernel whose compiled form raises, and how often that and the plain form were called: compiled, plain."""
    calls = [0, 0]

    def fast(x: Tensor) -> Tensor:
        calls[0] += 1
        raise error

    def plain(x: Tensor) -> Tensor:
        calls[1] += 1
        return 2 * x

    monkeypatch.setattr(torch, "compile", lambda function: fast)
    monkeypatch.setattr(compiling, "COMPILE_FROM", 4)
    return compiling.compiled(plain), calls


def test_without_a_compiler_there_is_one_warning_the_right_result_and_no_second_attempt(monkeypatch, caplog):
    kernel, calls = failing(monkeypatch, RuntimeError("no working C++ compiler\nand much more"))
    with caplog.at_level(logging.WARNING, logger="vit_attn"):
        for _ in range(3):
            assert torch.equal(kernel(torch.ones(8)), torch.full((8,), 2.0))
    assert calls == [1, 3]
    assert [record.getMessage() for record in caplog.records] == [
        "attention runs without compiled kernels, which is slower: no working C++ compiler"
    ]
    assert compiling._works is False


def test_small_inputs_are_not_compiled(monkeypatch):
    kernel, calls = failing(monkeypatch, RuntimeError())
    kernel(torch.ones(3))
    assert calls == [0, 1]
    kernel(torch.ones(4))
    assert calls == [1, 2]


def test_out_of_memory_is_no_missing_compiler(monkeypatch):
    kernel, calls = failing(monkeypatch, torch.OutOfMemoryError("too much"))
    with pytest.raises(torch.OutOfMemoryError):
        kernel(torch.ones(8))
    assert calls == [1, 0]
    assert compiling._works


def test_what_is_wrong_with_the_arguments_is_raised_and_blamed_on_no_compiler(monkeypatch):
    def wrong(x: Tensor) -> Tensor:
        raise ValueError("wrong")

    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(compiling, "COMPILE_FROM", 4)
    with pytest.raises(ValueError, match="wrong"):
        compiling.compiled(wrong)(torch.ones(8))
    assert compiling._works
