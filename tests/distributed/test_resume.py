"""Resuming: at the same layout equal to the bit, at any other the same samples and the same losses."""

from __future__ import annotations

import io
import pickle
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from paralign.engine.checkpoint import store
from paralign.engine.checkpoint.convert import convert
from paralign.engine.checkpoint.dcpfile import CheckpointFiles
from paralign.engine.checkpoint.manifest import MANIFEST
from paralign.engine.checkpoint.unpickle import MetadataReader, read_metadata, refuse_more_than_tensors
from paralign.engine.checkpoint.verify import check_against_manifest
from paralign.engine.parallel.mesh import open_mesh
from paralign.engine.processes.stop import Stop
from paralign.engine.run.assemble import build_trainer
from paralign.engine.run.check import check
from paralign.engine.run.recipe import load
from paralign.models.errors import CheckpointError, WeightsError

from ..harm import Harm
from .comparing import assert_weights_equal, metrics_of
from .pool import RankFailure, RankPool
from .toy import forget_checksums, make_toy, train_recipe, write_recipe

TP2_PP2_DP2 = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "sequence_parallel": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}
OTHERS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "TP4": (4, {"tensor_model_parallel_size": 4}),
    "PP2×VPP2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "DP4": (4, {}),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Path:
    """Ten steps without a break at TP2×PP2×DP2, the state after five kept; tied embeddings and biases."""
    directory = tmp_path_factory.mktemp("toy")
    make_toy(directory, family="qwen2")
    ranks.run(8, train_recipe, write_recipe(directory, "straight", TP2_PP2_DP2))
    return directory


def _copy_first_checkpoint(directory: Path, name: str) -> None:
    root = directory / name / "checkpoints"
    root.mkdir(parents=True)
    shutil.copytree(directory / "straight/checkpoints/iter_0000005", root / "iter_0000005")


@pytest.mark.parametrize("async_save", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_same_layout_is_equal_to_the_bit(trained: Path, async_save: bool, ranks: RankPool) -> None:
    name = f"killed-{async_save}"
    recipe = write_recipe(trained, name, TP2_PP2_DP2, checkpoint__async_save=async_save)
    with pytest.raises(RankFailure):
        ranks.run(8, train_recipe, recipe, 8)  # killed in its ninth step
    assert store.latest(trained / name / "checkpoints") == trained / name / "checkpoints/iter_0000005"
    # Saving again costs a process a rank; the unbroken run has shown it.
    ranks.run(8, train_recipe, write_recipe(trained, name, TP2_PP2_DP2, checkpoint__save_every_steps=None))

    assert metrics_of(trained / name) == metrics_of(trained / "straight")
    assert_weights_equal(trained / name / "hf/final", trained / "straight/hf/final")


def test_two_copies_in_bf16_are_equal_to_the_bit(trained: Path, ranks: RankPool) -> None:
    """Each has a part of the fp32 weights, and writes it in the background."""
    settings: dict[str, Any] = {"model__dtype": "bf16", "checkpoint__async_save": True}
    overlapped = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 20000}
    recipe = write_recipe(trained, "bf16", overlapped, **settings)
    ranks.run(2, train_recipe, recipe)
    straight = metrics_of(trained / "bf16")
    shutil.move(trained / "bf16/hf/final", trained / "bf16-final")
    shutil.rmtree(trained / "bf16/checkpoints/iter_0000010")
    ranks.run(2, train_recipe, recipe)
    assert metrics_of(trained / "bf16") == straight
    assert_weights_equal(trained / "bf16/hf/final", trained / "bf16-final")


def _other_weights(rank: int, world_size: int, recipe: Path) -> list[str]:
    """Of weights as they are when the run has been resumed, those that are not the fp32 weights of its state."""
    report = check(load(recipe), world_size)
    saved = CheckpointFiles(report.recipe.run_dir / "checkpoints/iter_0000005")
    with open_mesh(report.layout, local_rank=rank, seed=1) as mesh:
        model = build_trainer(report, mesh, Stop()).learner.model
        return [
            name
            for name, weight in model.named_weights()
            if not torch.equal(weight, saved.read(f"optimizer.state.param.{name}"))
        ]


def test_a_state_of_bf16_goes_on_in_fp32_with_its_fp32_weights(trained: Path, ranks: RankPool) -> None:
    ranks.run(2, train_recipe, write_recipe(trained, "wider", {}, model__dtype="bf16", train__max_steps=5))
    recipe = write_recipe(trained, "wider", {}, model__dtype="fp32")
    assert ranks.run(2, _other_weights, recipe) == [[], []]


@pytest.mark.parametrize("layout", list(OTHERS))
def test_another_layout_goes_on_alike(trained: Path, layout: str, ranks: RankPool) -> None:
    world_size, keys = OTHERS[layout]
    _copy_first_checkpoint(trained, layout)
    recipe = write_recipe(trained, layout, keys, checkpoint__save_every_steps=None)
    ranks.run(world_size, train_recipe, recipe)
    resumed, straight = metrics_of(trained / layout), metrics_of(trained / "straight")
    assert min(step for step, _ in resumed) == 5
    for key, value in resumed.items():
        assert value == pytest.approx(straight[key], rel=1e-5), key  # samples and learning rate exactly


def test_convert_gives_the_export(trained: Path, tmp_path: Path) -> None:
    convert(trained / "straight/checkpoints/iter_0000010", tmp_path / "hf", progress=False)
    exported = trained / "straight/hf/final"
    assert_weights_equal(tmp_path / "hf", exported)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "hf" / name).read_bytes() == (exported / name).read_bytes(), name
    assert check_against_manifest(exported) == []


def test_convert_refuses_a_flipped_bit_in_what_the_run_saved(trained: Path, tmp_path: Path) -> None:
    """megatron-core's writer keeps a CRC32 with each share of a tensor, and each tells."""
    saved = trained / "straight/checkpoints/iter_0000010"
    directory = tmp_path / saved.name
    shutil.copytree(saved, directory)
    (directory / MANIFEST).unlink(missing_ok=True)
    for name in ("decoder.layers.1.mlp.linear_fc1.weight", "embedding.word_embeddings.weight"):
        item = next(item for key, item in read_metadata(directory).storage_data.items() if key.fqn == name)
        path = directory / item.relative_path
        content = bytearray(path.read_bytes())
        content[item.offset + item.length * 6 // 10] ^= 16
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=rf"{path.name}: {name}: other bytes than its CRC32"):
            convert(directory, tmp_path / "hf", progress=False)
        assert not (tmp_path / "hf").exists()
        shutil.copyfile(saved / path.name, path)


def test_other_data_is_refused(trained: Path, ranks: RankPool) -> None:
    _copy_first_checkpoint(trained, "other-data")
    recipe = write_recipe(trained, "other-data", {}, train__seed=4)
    with pytest.raises(RankFailure, match="samples would be skipped or seen twice; restore"):
        ranks.run(1, train_recipe, recipe)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("common.pt", b""),
        ("common.pt", bytes(2000)),
        ("common.pt", b"X\n"),
        ("metadata.json", bytes(100)),
        ("metadata.json", b'{"sharded_backend": "zarr"}'),
        ("more.distcp", bytes(3000)),
    ],
)
def test_a_damaged_checkpoint_is_called_that(
    trained: Path, file: str, content: bytes, ranks: RankPool
) -> None:
    name = f"damaged-{file}-{len(content)}"
    _copy_first_checkpoint(trained, name)
    directory = trained / name / "checkpoints/iter_0000005"
    forget_checksums(directory)
    if file == "more.distcp":
        _point_an_object_to(directory, file, len(content))
    (directory / file).write_bytes(content)
    with pytest.raises(RankFailure, match=rf"{file}: cannot be read \(.*\); copy the checkpoint again"):
        ranks.run(1, train_recipe, write_recipe(trained, name, {}))


def test_a_cut_file_without_checksums_is_called_that(trained: Path, ranks: RankPool) -> None:
    _copy_first_checkpoint(trained, "cut")
    directory = trained / "cut/checkpoints/iter_0000005"
    forget_checksums(directory)
    path = directory / "__3_0.distcp"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(
        RankFailure, match=r"__3_0.distcp: \S+: not a tensor as torch.save writes it .*copy the"
    ):
        ranks.run(2, train_recipe, write_recipe(trained, "cut", {"tensor_model_parallel_size": 2}))


def _point_an_object_to(directory: Path, file: str, n_bytes: int) -> None:
    """What megatron-core keeps for a layer with a state that is no tensor is to be read from there."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    for index, item in metadata.storage_data.items():
        if index.fqn.endswith("linear_fc1._extra_state/shard_0_1"):
            item.relative_path, item.offset, item.length = file, 0, n_bytes
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("where", [".metadata", "common.pt", "object"])
def test_code_in_a_checkpoint_is_refused(trained: Path, tmp_path: Path, where: str, ranks: RankPool) -> None:
    name = f"planted-{where}"
    _copy_first_checkpoint(trained, name)
    directory = trained / name / "checkpoints/iter_0000005"
    forget_checksums(directory)
    harm = Harm(tmp_path / "it-ran")
    if where == "object":
        content = io.BytesIO()
        torch.save(harm, content)
        _point_an_object_to(directory, "more.distcp", content.tell())
        (directory / "more.distcp").write_bytes(content.getvalue())
    elif where == "common.pt":
        torch.save({"optimizer": harm}, directory / where)
    else:
        (directory / where).write_bytes(pickle.dumps(harm))
    recipe = write_recipe(trained, name, {}, model__dtype="bf16")  # in fp32 nothing of a layer is opened
    with pytest.raises(RankFailure, match=r"it holds more than tensors: .*mkdir.*nothing of it was run"):
        ranks.run(1, train_recipe, recipe)
    with pytest.raises(RankFailure):
        ranks.run(1, unlooked_at, recipe)
    assert not harm.mark.exists()


@pytest.mark.parametrize(
    ("common", "words"),
    [
        ([{"optimizer": {}}], ""),
        ([{}], r"cannot be read \(it has no optimizer\)"),
        (
            Harm(Path("it-ran")),
            r"cannot be read \(it holds more than tensors: .*mkdir.*nothing of it was run",
        ),
    ],
)
def test_what_later_versions_keep_beside_the_tensors_is_looked_at(
    trained: Path, tmp_path: Path, common: Any, words: str
) -> None:
    directory = tmp_path / "saved"
    shutil.copytree(trained / "straight/checkpoints/iter_0000005", directory)
    (directory / "common.pt").unlink(missing_ok=True)
    content = io.BytesIO()
    torch.save(common, content)
    (directory / "more.distcp").write_bytes(content.getvalue())
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.state_dict_metadata["common_state/shard_0_1"] = BytesStorageMetadata()
    place = _StorageInfo("more.distcp", 0, content.tell())
    metadata.storage_data[MetadataIndex("common_state/shard_0_1")] = place
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    refused = pytest.raises(CheckpointError, match=rf"more\.distcp: {words}") if words else nullcontext()
    with refused:
        refuse_more_than_tensors(MetadataReader(directory))


def unlooked_at(rank: int, world_size: int, recipe: Path) -> None:
    """Resume without our look at the files: megatron-core and torch are not to run anything either."""
    from paralign.engine.training import state as native

    native.refuse_more_than_tensors = lambda directory: None  # type: ignore[assignment]
    train_recipe(rank, world_size, recipe)
