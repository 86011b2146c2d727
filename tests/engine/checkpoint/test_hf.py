"""Hugging Face directories: what transformers saved comes back bit-equal, what is broken is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from paralign.engine.checkpoint.hf import (
    Assets,
    HFReader,
    StageWriter,
    copy_assets,
    finish_export,
    parse_size,
    shard_plan,
)
from paralign.engine.data.tokenizer import TOKENIZER_FILES
from paralign.models import rules_for
from paralign.models.errors import WeightsError
from paralign.models.weights import bit_equal

from ...tiny import random_model, write_tokenizer

MODELS = {
    "llama": ("llama", False),
    "llama_tied": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen2_tied": ("qwen2", True),
}


def save_model(directory, kind="llama", max_shard_size="6KB"):
    family, tied = MODELS[kind]
    model = random_model(family, num_hidden_layers=3, tie_word_embeddings=tied).to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # biases and norms too, so that nothing is constant
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


def save_tokenizer(directory):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    words = ["<unk>", "hello", "<eos>"]
    write_tokenizer(directory, words, unk_token="<unk>", eos_token="<eos>", chat_template=template)


def export(reader, directory, *, stages=1, tp=2, max_shard_bytes=6000):
    """Slices at `tp`, joins, and writes as that many pipeline stages would, the last stage first."""
    per_stage = -(-len(reader.rules) // stages)
    rules = [reader.rules[i * per_stage : (i + 1) * per_stage] for i in range(stages)]
    plan = shard_plan(rules, dtype=torch.bfloat16, max_shard_bytes=max_shard_bytes)
    for stage in reversed(range(stages)):
        writer = StageWriter(directory, plan, stage)
        for rule in rules[stage]:
            for name, tensor in rule.join([rule.slice(reader.read, rank, tp) for rank in range(tp)]).items():
                writer.add(name, tensor)
        writer.close()
    finish_export(directory, plan)
    return plan


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_to_slices_and_back(tmp_path, kind):
    original = save_model(tmp_path / "src", kind)
    assert len(list((tmp_path / "src").glob("*.safetensors"))) > 2
    reader = HFReader(tmp_path / "src")
    plan = export(reader, tmp_path / "dst", stages=2)
    copy_assets(Assets(tmp_path / "src", tmp_path / "src"), tmp_path / "dst", dtype="bfloat16")
    assert plan.parameters == original.num_parameters()

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    assert loaded.dtype == torch.bfloat16
    expected = original.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(bit_equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert json.loads((tmp_path / "dst/config.json").read_text()) == json.loads(
        (tmp_path / "src/config.json").read_text()
    )
    assert not list((tmp_path / "dst").glob("*.part"))


def test_stages_write_files_of_their_own_within_the_size_asked_for(tmp_path):
    save_model(tmp_path / "src")
    plan = export(HFReader(tmp_path / "src"), tmp_path / "dst", stages=3, max_shard_bytes=3000)
    index = json.loads((tmp_path / "dst/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in plan.files}
    assert {file.stage for file in plan.files} == {0, 1, 2}
    assert index["metadata"]["total_size"] == plan.tensor_bytes
    for file in plan.files:
        tensors = load_file(tmp_path / "dst" / file.name)  # the safetensors package itself reads them
        assert {name: tuple(t.shape) for name, t in tensors.items()} == dict(file.shapes)
        assert sum(t.nbytes for t in tensors.values()) <= 3000


def test_a_small_model_is_one_file_without_an_index(tmp_path):
    save_model(tmp_path / "src", max_shard_size="5GB")
    export(HFReader(tmp_path / "src"), tmp_path / "dst", max_shard_bytes=parse_size("5GB"))
    assert {path.name for path in (tmp_path / "dst").iterdir()} == {"model.safetensors", "manifest.json"}


def test_nothing_looks_like_a_model_before_the_export_is_finished(tmp_path):
    save_model(tmp_path / "src")
    reader = HFReader(tmp_path / "src")
    plan = shard_plan([reader.rules[:5], reader.rules[5:]], dtype=torch.bfloat16, max_shard_bytes=10**6)
    writer = StageWriter(tmp_path / "dst", plan, 0)
    for rule in reader.rules[:5]:
        for name in rule.hf:
            writer.add(name, reader.read(name))
    writer.close()
    assert not list((tmp_path / "dst").glob("*.safetensors"))
    with pytest.raises(WeightsError, match=r"model-00002-of-00002.*stage 1 did not write"):
        finish_export(tmp_path / "dst", plan)
    assert not list((tmp_path / "dst").glob("*.safetensors"))


def test_a_directory_that_holds_weights_is_not_written_into(tmp_path):
    save_model(tmp_path, max_shard_size="5GB")
    plan = shard_plan([HFReader(tmp_path).rules], dtype=torch.bfloat16, max_shard_bytes=1000)
    with pytest.raises(WeightsError, match=r"already holds model.safetensors"):
        StageWriter(tmp_path, plan, 0)


def test_wrong_use_of_a_writer_is_a_fault(tmp_path):
    save_model(tmp_path / "src")
    reader = HFReader(tmp_path / "src")
    plan = shard_plan([reader.rules], dtype=torch.float32, max_shard_bytes=10**6)
    writer = StageWriter(tmp_path / "dst", plan, 0)
    writer.add("model.norm.weight", reader.read("model.norm.weight"))
    with pytest.raises(ValueError, match="added twice"):
        writer.add("model.norm.weight", reader.read("model.norm.weight"))
    with pytest.raises(WeightsError, match=r"lm_head.weight: found shape"):
        writer.add("lm_head.weight", torch.zeros(38, 16))
    with pytest.raises(ValueError, match=r"tensors were never added: lm_head.weight, model.embed"):
        writer.close()
    with pytest.raises(ValueError, match=r"planned twice: model.embed_tokens.weight"):
        shard_plan([reader.rules[:1], reader.rules[:1]], dtype=torch.float32, max_shard_bytes=1000)


def test_reading_a_slice_leaves_the_file_as_it_is(tmp_path):
    save_model(tmp_path)
    before = HFReader(tmp_path).read("model.norm.weight").clone()
    HFReader(tmp_path).read("model.norm.weight").fill_(7.0)
    assert bit_equal(HFReader(tmp_path).read("model.norm.weight"), before)


def edit_index(directory, edit):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def edit_config(directory, **change):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def shard_of(directory, name):
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / index["weight_map"][name]


def edit_shard(directory, name, edit):
    path = shard_of(directory, name)
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def edit_header(directory, edit):
    """Changes the entries of the first two tensors of a shard, by their place, and nothing behind the header."""
    path = shard_of(directory, "model.norm.weight")
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    first = sorted((entry["data_offsets"], name) for name, entry in header.items() if name != "__metadata__")
    edit(*(header[name] for _, name in first[:2]))
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def add_everywhere(directory, name, tensor):
    edit_shard(directory, "model.norm.weight", lambda tensors: tensors.__setitem__(name, tensor))
    file = shard_of(directory, "model.norm.weight").name
    edit_index(directory, lambda weight_map: weight_map.__setitem__(name, file))


def truncate(directory):
    path = shard_of(directory, "model.norm.weight")
    path.write_bytes(path.read_bytes()[:-10])


def point_to_lfs(directory):
    shard_of(directory, "model.norm.weight").write_text("version https://git-lfs.github.com/spec/v1\n")


def drop_norm(directory):
    edit_shard(directory, "model.norm.weight", lambda tensors: tensors.pop("model.norm.weight"))
    edit_index(directory, lambda weight_map: weight_map.pop("model.norm.weight"))


def quantise_norm(directory):
    int8 = torch.zeros(16, dtype=torch.int8)
    edit_shard(directory, "model.norm.weight", lambda tensors: tensors.__setitem__("model.norm.weight", int8))


def only_pickles(directory):
    for path in directory.glob("model*"):
        path.unlink()
    (directory / "pytorch_model.bin").touch()


BROKEN = {
    "no config": (lambda d: (d / "config.json").unlink(), r"config.json: there is no such file"),
    "config not JSON": (lambda d: (d / "config.json").write_text("{"), r"config.json: not JSON"),
    "other family": (
        lambda d: edit_config(d, architectures=["GPT2LMHeadModel"]),
        r"src/config.json architectures: read GPT2LMHeadModel",
    ),
    "missing shard": (
        lambda d: shard_of(d, "model.norm.weight").unlink(),
        r"model-0000.*safetensors: there is no such file",
    ),
    "extra shard": (
        lambda d: shutil.copy(shard_of(d, "model.norm.weight"), d / "model-00099-of-00099.safetensors"),
        r"holds model-00099-of-00099.safetensors, which model.safetensors.index.json does not name",
    ),
    "shards beside a whole file": (
        lambda d: shutil.copy(shard_of(d, "model.norm.weight"), d / "model.safetensors"),
        r"holds model-00001-of-\d+.safetensors.* beside model.safetensors; two saves are mixed",
    ),
    "truncated shard": (truncate, r"model-0000.*bytes, its header says"),
    "LFS pointer": (point_to_lfs, r"no safetensors header.*git lfs pull"),
    "no weights": (only_pickles, r"found pytorch_model.bin; save the model with"),
    "index names more": (
        lambda d: edit_index(d, lambda m: m.__setitem__("ghost", m["model.norm.weight"])),
        r"only the index has ghost",
    ),
    "index names less": (
        lambda d: edit_index(d, lambda m: m.pop("model.norm.weight")),
        r"only the file has model.norm.weight",
    ),
    "missing tensor": (drop_norm, r"lacks model.norm.weight, which config.json calls for"),
    "missing layer": (
        lambda d: edit_config(d, num_hidden_layers=4),
        r"lacks model.layers.3.input_layernorm.weight, .* and 6 more",
    ),
    "extra tensor": (
        lambda d: add_everywhere(d, "model.norm.bias", torch.zeros(16)),
        r"holds model.norm.bias, which config.json does not",
    ),
    "other vocabulary": (
        lambda d: edit_config(d, vocab_size=40),
        r"embed_tokens.weight: found shape \(37, 16\), expected \(40, 16\)",
    ),
    "tensors over one another": (
        lambda d: edit_header(d, lambda a, b: b.update(data_offsets=list(a["data_offsets"]))),
        r"safetensors: .* has bytes \d+ to \d+, where the next begin at \d+: tensors overlap, or leave a hole",
    ),
    "a tensor in the header": (
        lambda d: edit_header(d, lambda a, b: a.update(data_offsets=[-32, a["data_offsets"][1] - 32])),
        r"no safetensors header",
    ),
    "a tensor past the end": (
        lambda d: edit_header(d, lambda a, b: b.update(data_offsets=[10**9, 10**9 + 32])),
        r"tensors overlap, or leave a hole",
    ),
    "a hole": (
        lambda d: edit_header(d, lambda a, b: a.update(data_offsets=[2, a["data_offsets"][1]])),
        r"has bytes 2 to \d+, where the next begin at 0",
    ),
    "backwards": (
        lambda d: edit_header(d, lambda a, b: a.update(data_offsets=a["data_offsets"][::-1])),
        r"tensors overlap, or leave a hole",
    ),
    "offsets as text": (
        lambda d: edit_header(d, lambda a, b: a.update(data_offsets=["0", "9"])),
        r"no safetensors header",
    ),
    "a shape of no numbers": (
        lambda d: edit_header(d, lambda a, b: a.update(shape=[[1], 2.0])),
        r"no safetensors header",
    ),
    "a dtype of no text": (
        lambda d: edit_header(d, lambda a, b: a.update(dtype=["F32"])),
        r"no safetensors header",
    ),
    "a header that never ends": (
        lambda d: shard_of(d, "model.norm.weight").write_bytes(b"\xff" * 5000),
        r"no safetensors header",
    ),
    "a header of brackets": (
        lambda d: shard_of(d, "model.norm.weight").write_bytes((5000).to_bytes(8, "little") + b"[" * 5000),
        r"no safetensors header",
    ),
    "an index without a map": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": 5}'),
        r"index.json: no weight_map",
    ),
    "an index that leads out": (
        lambda d: edit_index(d, lambda m: m.__setitem__("model.norm.weight", "../secret.safetensors")),
        r"model.norm.weight in '../secret.safetensors'; expected the name of a file next to it",
    ),
    "an index of numbers": (
        lambda d: edit_index(d, lambda m: m.__setitem__("model.norm.weight", 5)),
        r"model.norm.weight in 5; expected the name",
    ),
    "quantised": (quantise_norm, r"model.norm.weight: dtype I8; expected one of F32"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    save_model(directory)
    return directory


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_directory_is_refused_when_it_is_opened(tmp_path, saved, what):
    directory = tmp_path / "src"
    shutil.copytree(saved, directory)
    damage, words = BROKEN[what]
    damage(directory)
    with pytest.raises(WeightsError, match=words):
        HFReader(directory)


def test_an_untied_model_without_a_head_says_what_may_be_wrong(tmp_path):
    save_model(tmp_path, "qwen2_tied")
    edit_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(WeightsError, match=r"lacks lm_head.weight.*tie_word_embeddings false"):
        HFReader(tmp_path)


def test_harmless_extras_are_tolerated(tmp_path):
    save_model(tmp_path, "qwen2_tied")
    add_everywhere(tmp_path, "lm_head.weight", torch.zeros(37, 16))
    add_everywhere(tmp_path, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(2))
    assert HFReader(tmp_path).arch.tied


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_config_keeps_every_key_and_its_style(tmp_path, key):
    config = {"zebra": [1], "architectures": ["LlamaForCausalLM"], key: "float32", "auto_map": {"a": "b"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    copy_assets(Assets(tmp_path, tmp_path), tmp_path / "dst", dtype="bfloat16")
    written = json.loads((tmp_path / "dst/config.json").read_text())
    assert written == config | {key: "bfloat16"}
    assert list(written) == list(config)
    assert [path.name for path in (tmp_path / "dst").iterdir()] == ["config.json"]


def test_every_file_of_a_tokenizer_travels_but_a_processors_template(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in TOKENIZER_FILES:
        (tmp_path / name).write_text("{}")
    copy_assets(Assets(tmp_path, tmp_path), tmp_path / "dst", dtype="bfloat16")
    copied = {path.name for path in (tmp_path / "dst").iterdir()}
    assert copied == {*TOKENIZER_FILES, "config.json"} - {"chat_template.json"}


def test_the_tokenizer_is_copied_verbatim(tmp_path):
    save_model(tmp_path / "src")
    save_tokenizer(tmp_path / "src")
    copy_assets(Assets(tmp_path / "src", tmp_path / "src"), tmp_path / "dst", dtype="bfloat16")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "dst" / name).read_bytes() == (tmp_path / "src" / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dst")
    assert tokenizer("hello there <eos>")["input_ids"] == [1, 0, 2]


@pytest.mark.parametrize("old_place", [False, True])
def test_a_named_chat_template_replaces_the_tokenizers_own(tmp_path, old_place):
    save_model(tmp_path / "src")
    save_tokenizer(tmp_path / "src")
    if old_place:  # transformers before 4.43 kept it inside tokenizer_config.json
        path = tmp_path / "src/tokenizer_config.json"
        template = (tmp_path / "src/chat_template.jinja").read_text()
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
        (tmp_path / "src/chat_template.jinja").unlink()
    ours = "{% for m in messages %}<{{ m['role'] }}>{% endfor %}"
    copy_assets(Assets(tmp_path / "src", tmp_path / "src", ours), tmp_path / "dst", dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dst")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<user>"
    if old_place:
        assert json.loads((tmp_path / "dst/tokenizer_config.json").read_text())["chat_template"] == ours


def test_the_plan_is_a_pure_function_of_its_arguments(saved):
    rules = rules_for(HFReader(saved).arch)
    plans = [shard_plan([rules[:7], rules[7:]], dtype=torch.float32, max_shard_bytes=4000) for _ in range(2)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("512MiB", 2**29), ("6 kb", 6000), ("10B", 10)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5", "GB", "0GB", "five GB", "-1GB"])
def test_sizes_that_are_none(text):
    with pytest.raises(WeightsError, match="max_shard_size: read"):
        parse_size(text)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [(None, [2, 7]), ({"eos_token_id": [2, 7], "top_p": 0.9}, [2, 7]), ({"eos_token_id": 5}, [5, 7])],
)
def test_generation_stops_where_training_did(
    tmp_path: Path, generation: dict[str, object] | None, expected: list[int]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2, "torch_dtype": "float32"}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    copy_assets(Assets(tmp_path, tmp_path, stop_token=7), tmp_path / "dst", dtype="float32")
    written = json.loads((tmp_path / "dst/generation_config.json").read_text())
    assert written["eos_token_id"] == expected
    assert written == (generation or {}) | {"eos_token_id": expected}
