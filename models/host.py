"""Lets megatron-core run where there is no CUDA, by one import hook; torch itself is never touched.

megatron-core names CUDA at some four hundred places: `torch.cuda.current_device()`, `device="cuda"`,
`.cuda()`, pinned memory. Where CUDA is absent, `install()` puts a finder before Python's own that rewrites
the *source* of `megatron.core.*` while it is loaded, as hipify does for another vendor:

    torch.cuda.X                → HOST.X           (a small namespace over the CPU; unlisted names fail as before)
    "cuda" as a device          → "cpu"
    x.cuda(...)                 → x.cpu()
    pin_memory=True             → pin_memory=False
    "torch.cuda.FloatTensor"    → "torch.FloatTensor"
    torch.compile               → identity         (compiling a tiny model costs more than running it)

So tests run the schedules, data parallelism, optimizer and checkpoint code that the cluster runs. Line
numbers are kept. It must be installed before megatron is imported: models/mcore.py sees to that.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

_PACKAGE = "megatron.core"
_HOST_NAME = "__paralign_host__"


def _nothing(*args: Any, **kwargs: Any) -> None:
    del args, kwargs


class _Stream:
    """A stream or event of a device that does everything at once."""

    __init__ = wait_stream = wait_event = wait = record = synchronize = _nothing

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        del end
        return 0.0


class _Generators:
    def __getitem__(self, device: int) -> torch.Generator:
        del device
        return torch.default_generator


def _identity(function: Callable | None = None, **options: Any) -> Callable:
    del options
    return function if function is not None else lambda inner: inner


def _get_rng_state(device: Any = None) -> torch.Tensor:
    del device
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    del device
    torch.set_rng_state(new_state)


def _null_context(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
    del args, kwargs
    return contextlib.nullcontext()


def _make_host() -> types.ModuleType:
    host = types.ModuleType("paralign_host")
    cpu = torch.device("cpu")
    host.__dict__.update(
        current_device=lambda: cpu,
        device_count=lambda: 1,
        set_device=_nothing,
        synchronize=_nothing,
        empty_cache=_nothing,
        current_stream=_Stream,
        default_stream=_Stream,
        Stream=_Stream,
        Event=_Stream,
        stream=_null_context,
        device=_null_context,
        get_rng_state=_get_rng_state,
        set_rng_state=_set_rng_state,
        manual_seed=torch.default_generator.manual_seed,
        default_generators=_Generators(),
        random=types.SimpleNamespace(get_rng_state=_get_rng_state, set_rng_state=_set_rng_state),
        _lazy_call=lambda callback, **options: callback(),
        _lazy_init=_nothing,
        FloatTensor=torch.FloatTensor,
        HalfTensor=torch.HalfTensor,
        BFloat16Tensor=torch.BFloat16Tensor,
        compile=_identity,
    )
    # A name not listed keeps torch's own, failing behaviour: better loud than wrong.
    host.__getattr__ = lambda name: getattr(torch.cuda, name)  # type: ignore[method-assign]
    return host


class _Rewrite(ast.NodeTransformer):
    @staticmethod
    def _is_torch(node: ast.AST, attribute: str) -> bool:
        return (
            isinstance(node, ast.Attribute)
            and node.attr == attribute
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
        )

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if self._is_torch(node.value, "cuda") or self._is_torch(node, "compile"):
            node.value = ast.copy_location(ast.Name(_HOST_NAME, ast.Load()), node.value)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            node.func.attr, node.args, node.keywords = "cpu", [], []
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.value, ast.Constant):
            if node.arg == "device" and node.value.value == "cuda":
                node.value.value = "cpu"
            if node.arg == "pin_memory" and node.value.value is True:
                node.value.value = False
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str) and node.value.startswith("torch.cuda.") and "Tensor" in node.value:
            node.value = node.value.replace("torch.cuda.", "torch.", 1)
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        if node.module == "torch.cuda" and node.level == 0:
            node.module = "paralign_host"
        return node


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles the rewritten source; never reads or writes the shared bytecode cache."""

    def __init__(self, name: str, path: str, host: types.ModuleType) -> None:
        super().__init__(name, path)
        self._host = host

    def get_code(self, fullname: str) -> types.CodeType | None:
        path = self.get_filename(fullname)
        source = self.get_data(path)
        if b"cuda" not in source and b"torch.compile" not in source:
            return super().get_code(fullname)
        tree = ast.fix_missing_locations(_Rewrite().visit(ast.parse(source, path)))
        return compile(tree, path, "exec", dont_inherit=True)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__[_HOST_NAME] = self._host
        super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self._host = _make_host()
        sys.modules["paralign_host"] = self._host

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != _PACKAGE and not fullname.startswith(_PACKAGE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path, self._host)
        return spec


def install() -> bool:
    """Install the hook if there is no CUDA; True if it is in place.

    Raises:
        RuntimeError: megatron.core was imported first, with its CUDA calls as they are.
    """
    if torch.cuda.is_available():
        return False
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return True
    if _PACKAGE in sys.modules:
        raise RuntimeError("megatron.core was imported before paralign.models.mcore; import mcore first")
    sys.meta_path.insert(0, _Finder())
    return True
