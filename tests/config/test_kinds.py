# ruff: noqa: E501 - a whole message stays in one piece
import sys
from pathlib import Path

import pytest
import torch

from noether.config.errors import InvalidValueError
from noether.config.objects.function_callback import FunctionCallbackFactory
from noether.config.objects.import_policy import import_path
from noether.config.objects.kinds import CALLBACK, DATASET, FUNCTION, MODEL, OPTIMIZER, Kind, resolve

pytestmark = pytest.mark.usefixtures("shop")

HOW = "is not an allowed prefix (noether, torch, modules under the working directory)"
A_CALLBACK = "expected a callback: a subclass of CallbackBase, or a function (state, event) -> (state, effects)"


def refusal(path, role, allow=()):
    with pytest.raises(InvalidValueError) as caught:
        resolve(path, role, allow)
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("shop.Net", MODEL),
        ("shop.make_net", MODEL),
        ("torch.nn.Linear", MODEL),
        ("shop.Digits", DATASET),
        ("torch.optim.AdamW", OPTIMIZER),
        ("shop.loss", FUNCTION),
        ("torch.nn.functional.cross_entropy", FUNCTION),
        ("shop.Watch", CALLBACK),
        ("shop.say", CALLBACK),
    ],
)
def test_an_object_that_fits_its_role_resolves(path, role):
    assert resolve(path, role) is import_path(path)


@pytest.mark.parametrize(
    ("path", "role", "message"),
    [
        ("os.system", FUNCTION, f"'os.system': 'os' {HOW}; to allow it, pass allow=('os',), or --allow os on the command line"),
        ("torch.os.system", FUNCTION, f"'torch.os.system': 'os' {HOW}; to allow it, pass allow=('os',), or --allow os on the command line"),
        ("sys.exit", FUNCTION, f"'sys.exit': 'sys' {HOW}; to allow it, pass allow=('sys',), or --allow sys on the command line"),
        ("yaml.load", FUNCTION, f"'yaml.load': 'yaml' {HOW}; to allow it, pass allow=('yaml',), or --allow yaml on the command line"),
        ("noehter.core.Progress", CALLBACK, "'noehter.core.Progress': there is no module 'noehter'; did you mean 'noether'?"),
        ("noether.core.calbacks.X", CALLBACK, "'noether.core.calbacks.X': 'noether.core' has no 'calbacks'; did you mean 'callbacks'?"),
        ("shop.Wacth", CALLBACK, "'shop.Wacth': 'shop' has no 'Wacth'; did you mean 'Watch'?"),
        ("shop.Net.__init__.__globals__", FUNCTION, "'shop.Net.__init__.__globals__': 'shop.Net' has no '__init__'"),
        ("Watch", CALLBACK, "'Watch' is not a dotted path such as 'package.module.name'"),
        (3, CALLBACK, "3 is not a dotted path such as 'package.module.name'"),
        ("shop .Net", CALLBACK, "'shop .Net' is not a dotted path such as 'package.module.name'"),
        ("torch.nn.Linear", CALLBACK, f"'torch.nn.Linear' is a model class, {A_CALLBACK}"),
        ("shop.number", CALLBACK, f"'shop.number' is of type int, {A_CALLBACK}"),
        ("shop.Watch", MODEL, "'shop.Watch' is a callback class, expected a model: a subclass of torch.nn.Module, or a function annotated to return one"),
        ("shop.loss", MODEL, "'shop.loss' is a function, expected a model: a subclass of torch.nn.Module, or a function annotated to return one"),
        ("shop.Net", OPTIMIZER, "'shop.Net' is a model class, expected an optimizer: a subclass of torch.optim.Optimizer"),
        ("torch.nn", MODEL, "'torch.nn' is a module, expected a model: a subclass of torch.nn.Module, or a function annotated to return one"),
        ("shop.Digits", FUNCTION, "'shop.Digits' is a dataset class, expected a function: a callable that is not a class"),
    ],
)  # fmt: skip
def test_an_object_that_does_not_fit_is_refused(path, role, message):
    assert refusal(path, role) == message


def test_a_forbidden_module_is_not_imported():
    sys.modules.pop("this", None)
    refusal("this.s", FUNCTION)
    assert "this" not in sys.modules


def test_a_prefix_can_be_allowed():
    assert resolve("math.hypot", FUNCTION, ("math",)).__name__ == "hypot"
    assert "'math' is not an allowed prefix" in refusal("math.hypot", FUNCTION, ("mathematics",))


def test_a_library_installed_in_the_working_directory_needs_allow(monkeypatch):
    folder = Path("venv/lib/site-packages")
    folder.mkdir(parents=True)
    (folder / "lurking.py").write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(str(folder.resolve()))
    monkeypatch.setattr("noether.config.objects.import_policy.sysconfig.get_path", lambda _: str(folder))
    assert refusal("lurking.run", FUNCTION).startswith("'lurking.run': 'lurking' is not an allowed prefix")


def test_a_module_that_fails_to_import_is_refused_with_the_error():
    Path("broken.py").write_text("import nothing_like_this")
    Path("ends.py").write_text("raise SystemExit(3)")
    assert refusal("broken.f", FUNCTION) == (
        "'broken.f': importing 'broken' failed: ModuleNotFoundError: No module named 'nothing_like_this'"
    )
    assert refusal("ends.f", FUNCTION) == "'ends.f': importing 'ends' failed: SystemExit: 3"


def test_build_constructs_the_object():
    assert Kind("torch.nn.Linear", torch.nn.Linear, {"out_features": 2}).build(3).weight.shape == (2, 3)


def test_an_interval_beside_a_function_is_its_gate():
    say = resolve("shop.say", CALLBACK)
    assert FunctionCallbackFactory(say)() is say
    assert FunctionCallbackFactory(say)(every_n_epochs=2, at_end=True).gate.at_end
    with pytest.raises(InvalidValueError, match="every_n_epochs and every_n_updates are given"):
        FunctionCallbackFactory(say)(every_n_epochs=2, every_n_updates=2)
    with pytest.raises(InvalidValueError, match="at_end needs an interval"):
        FunctionCallbackFactory(say)(at_end=True)
