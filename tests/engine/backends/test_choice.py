"""Which implementation runs: the library found or refused, the recipe's key, the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from paralign.engine.backends import backend_of, check_backend, ours
from paralign.engine.backends.ours import FUSED, TORCH, Kernels, Ours, parts_of
from paralign.engine.cli import app
from paralign.engine.config.model import ModelConfig
from paralign.engine.kernels import build, library
from paralign.engine.kernels.library import Found, built_library, find_library, library_for, sources_digest
from paralign.models import arch_from_hf
from paralign.models.attention import sdpa_attention
from paralign.models.decoder import Parts
from paralign.models.errors import RecipeError

from ...tiny import config_keys


@pytest.fixture(autouse=True)
def forget_the_library() -> None:
    find_library.cache_clear()


@pytest.fixture
def not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "build" / "kernels.so")
    return tmp_path / "build" / "kernels.so"


def test_without_kernels_torch_runs_and_with_them_our_operations(
    not_built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch, cpu = arch_from_hf(config_keys()), torch.device("cpu")
    fused, torchs = (parts_of(arch, operations, sdpa_attention) for operations in (FUSED, TORCH))

    def parts(kernels: Kernels) -> Parts:
        return Ours(kernels).parts(arch, cpu, torch.float32)

    assert parts("auto") == torchs == parts("reference")
    assert not Ours("auto").fuses_updates
    assert not Ours("reference").fuses_updates
    assert library_for(torch.ones(1)) is None
    found = Found(object(), ("sm_90", "PTX 90"))  # type: ignore[arg-type]
    monkeypatch.setattr(ours, "find_library", lambda: found)
    assert parts("auto") == parts("required") == fused
    assert Ours("auto").fuses_updates
    assert not Ours("reference").fuses_updates
    assert parts("reference") == torchs
    assert Ours("auto").facts(arch, cpu, torch.float32)["kernels"] == "CUDA, sm_90, PTX 90"
    told = Ours("reference").facts(arch, cpu, torch.float32)
    assert told["kernels"] == "torch, as the recipe says, but for the head"


def test_required_refuses_the_fallback_and_says_why(not_built: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"model.kernels: required, but they are not built; run `paralign kernels"
    ):
        backend_of(ModelConfig(hf=Path(), dtype="bf16", kernels="required"))
    arch = arch_from_hf(config_keys())
    told = Ours().facts(arch, torch.device("cpu"), torch.float32)
    assert told["kernels"] == "torch (not built; run `paralign kernels build`)"


def test_a_model_that_the_backend_has_no_part_for_is_refused_at_the_check() -> None:
    arch = replace(arch_from_hf(config_keys()), alibi=True)
    section = ModelConfig(hf=Path(), dtype="bf16", attention_backend="varlen")
    with pytest.raises(RecipeError, match="varlen takes no ALiBi slopes; or set it to auto"):
        check_backend(section, arch)
    for backend in ("flash", "varlen"):
        section = ModelConfig(hf=Path(), dtype="fp32", attention_backend=backend)
        with pytest.raises(RecipeError, match=f"{backend} runs in bf16, and model.dtype is fp32; set"):
            check_backend(section, replace(arch, alibi=False))


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_check_looks_for_required_kernels_where_a_gpu_is(
    not_built: Path, monkeypatch: pytest.MonkeyPatch, gpus: int
) -> None:
    """A login node need not have what the nodes have that train."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    section, arch = ModelConfig(hf=Path(), dtype="bf16", kernels="required"), arch_from_hf(config_keys())
    with pytest.raises(RecipeError, match="required, but they are not built") if gpus else nullcontext():
        check_backend(section, arch)


def test_a_library_without_a_device_is_named_and_not_loaded(
    not_built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    not_built.parent.mkdir()
    not_built.write_bytes(b"no library")
    not_built.with_suffix(".json").write_text(json.dumps({"architectures": ["sm_90"]}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_library() == Found(None, ("sm_90",), "built, but torch finds no CUDA device")


def test_a_library_that_cannot_be_loaded(not_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    not_built.parent.mkdir()
    not_built.write_bytes(b"no library")
    not_built.with_suffix(".json").write_text(json.dumps({"architectures": ["sm_90"]}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = find_library()
    assert found.library is None
    assert "built, but cannot be loaded (" in found.reason
    assert found.reason.endswith("run `paralign kernels build`")


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_library_of_other_sources_is_refused(not_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    not_built.parent.mkdir()
    code = 'extern "C" { const char* paralign_sources() { return "%s"; } void* paralign_error = nullptr; }'
    for digest in ("other", sources_digest()):
        source = not_built.with_suffix(".cpp")
        source.write_text(code % digest)
        target = not_built.with_name(f"{digest}.so")
        subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
        target.with_suffix(".json").write_text(json.dumps({"architectures": ["sm_90"]}))
        monkeypatch.setattr(library, "LIBRARY", target)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        found = built_library()
        assert (found.library is None) == (digest == "other")
        assert found.reason == (
            "built from other sources; run `paralign kernels build`" if digest == "other" else ""
        )


def test_the_digest_follows_every_source(tmp_path: Path) -> None:
    shutil.copytree(library.SOURCES, tmp_path / "csrc", ignore=shutil.ignore_patterns("build"))
    assert sources_digest(tmp_path / "csrc") == sources_digest()
    for name in ("rmsnorm.cu", "common/reduce.cuh"):
        before = sources_digest(tmp_path / "csrc")
        (tmp_path / "csrc" / name).write_text("// changed")
        assert sources_digest(tmp_path / "csrc") != before


def test_the_command_lists_every_operation_and_its_self_check() -> None:
    result = CliRunner().invoke(app, ["kernels"])
    assert result.exit_code == 0, result.output
    for name in ("rms_norm", "add_rms_norm", "swiglu", "rope", "token_statistics", "squared_sum", "adamw_"):
        assert name in result.output
    assert "agrees" in result.output
    assert "DIFFERS" not in result.output
    # What the first minutes on a GPU ask: tests that need kernels are skipped where these cannot run.
    assert CliRunner().invoke(app, ["kernels", "--required"]).exit_code == 1


def test_a_build_without_nvcc_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    result = CliRunner().invoke(app, ["kernels", "build"])
    assert isinstance(result.exception, build.BuildError)
    assert "no nvcc on PATH; install the CUDA toolkit, or set CUDA_HOME" in str(result.exception)
