"""What a run computes must not depend on the defaults of the process that it runs in."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ddit_rt

ROOT = Path(ddit_rt.__file__).parent
# These make pictures, adapters and figures, in programs of their own.
PROGRAMS = {"lab"}
CONSTRUCTORS = {
    *("arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand"),
    *("randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "zeros"),
}
OTHER_OPENS = {
    *("Image.open", "av.open", "example.open", "os.open", "tarfile.open"),
    *("run.open", "self._executor.open", "self._run.open"),  # of a session, not of a file
}
LAYERS = {"Bilinear", "Conv2d", "Conv3d", "Embedding", "LayerNorm", "Linear", "RMSNorm"}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Calls of a module with the dotted name of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def depends_on_defaults(name: str, call: ast.Call) -> bool:
    """Whether a call makes a tensor or a layer of the default dtype or on the default device."""
    module, _, kind = name.rpartition(".")
    makes = (module == "torch" and kind in CONSTRUCTORS) or (
        module in ("nn", "torch.nn") and kind in LAYERS
    )
    given = {keyword.arg for keyword in call.keywords}
    return makes and not given >= {"dtype", "device"}


def depends_on_locale(name: str, call: ast.Call) -> bool:
    """Whether a call reads or writes text in whatever encoding the locale has."""
    kind = name.rpartition(".")[2]
    texts = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
    given = {keyword.arg for keyword in call.keywords}
    if "encoding" in given or name in OTHER_OPENS:
        return False
    if kind in ("read_text", "write_text"):
        return not any(text in ("utf-8", "ascii") for text in texts)
    return kind == "open" and not any(isinstance(text, str) and "b" in text for text in texts)


def found(rule: object, paths: Iterator[Path]) -> list[str]:
    assert callable(rule)
    return [
        f"{path.relative_to(ROOT)}:{call.lineno} {ast.unparse(call)}"
        for path in paths
        for name, call in calls(ast.parse(path.read_text("utf-8")))
        if rule(name, call)
    ]


def test_runtime_names_dtype_and_device_of_all_that_it_makes() -> None:
    paths = (p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] not in PROGRAMS)
    assert found(depends_on_defaults, paths) == []


def test_text_files_name_their_encoding() -> None:
    assert found(depends_on_locale, ROOT.rglob("*.py")) == []


@pytest.mark.parametrize(
    ("rule", "code", "caught"),
    [
        (depends_on_defaults, "torch.zeros(3)", True),
        (depends_on_defaults, "torch.tensor([1], dtype=torch.int32)", True),
        (depends_on_defaults, "torch.arange(3, device=device)", True),
        (depends_on_defaults, "nn.Linear(3, 4)", True),
        (depends_on_defaults, "torch.zeros(3, dtype=torch.float32, device='cpu')", False),
        (depends_on_defaults, "tensor.new_zeros(3)", False),
        (depends_on_defaults, "torch.zeros_like(tensor)", False),
        (depends_on_locale, "path.read_text()", True),
        (depends_on_locale, "path.write_text(text)", True),
        (depends_on_locale, "open(path)", True),
        (depends_on_locale, "path.open('w')", True),
        (depends_on_locale, "path.open('rb')", False),
        (depends_on_locale, "path.write_text(text, 'utf-8')", False),
    ],
)
def test_rules_catch_what_they_are_for(rule: object, code: str, caught: bool) -> None:
    ((name, call),) = calls(ast.parse(code))
    assert callable(rule)
    assert rule(name, call) is caught
