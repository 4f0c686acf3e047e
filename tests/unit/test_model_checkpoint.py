"""Hugging Face folders in and out: byte-equal round trips with transformers' own, and every damaged folder refused."""

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from strop.engine.config import InputError
from strop.engine.model.checkpoint import load_hf_folder, save_hf_folder
from strop.engine.model.context import ForwardContext

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
THEIR_CONFIGS = {
    "llama": LlamaConfig(**SIZES, eos_token_id=[2, 5]),
    "qwen2 tied": Qwen2Config(**SIZES, tie_word_embeddings=True, max_window_layers=2),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    bytes_of = [
        {n: (t.dtype, t.shape, t.view(torch.uint8).numpy().tobytes()) for n, t in tensors.items()} for tensors in (a, b)
    ]
    return bytes_of[0] == bytes_of[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("their_config", THEIR_CONFIGS.values(), ids=THEIR_CONFIGS.keys())
def test_round_trip_is_byte_equal_and_transformers_reads_it_back(their_config, dtype, tmp_path):
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(their_config, dtype=dtype)
    original.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    ours = load_hf_folder(tmp_path / "theirs", dtype=None, device="cpu")
    save_hf_folder(ours, tmp_path / "ours", tokenizer_from=tmp_path / "theirs", max_shard_bytes=60_000)
    assert same_bytes(tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours"))
    assert max(file.stat().st_size for file in (tmp_path / "ours").glob("*.safetensors")) < 64_000
    assert (tmp_path / "ours" / "generation_config.json").read_bytes() == (
        tmp_path / "theirs/generation_config.json"
    ).read_bytes()

    configs = [AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("theirs", "ours")]
    assert configs[0] | {"_name_or_path": ""} == configs[1] | {"_name_or_path": ""}
    reloaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=dtype, output_loading_info=True)
    assert not any(report.values())
    ids = torch.arange(40)
    with torch.no_grad():
        assert torch.equal(reloaded(ids[None]).logits, original.eval()(ids[None]).logits)
        logits = ours(ids, ForwardContext.one_sequence(40)) @ ours.lm_head_weight.T
    assert (logits - reloaded(ids[None]).logits[0]).abs().max() <= (1e-5 if dtype == torch.float32 else 0.02)


def test_loading_converts_to_the_dtype_that_is_asked_for(folder):
    with torch.no_grad():
        stored, half = (load_hf_folder(folder, dtype, "cpu") for dtype in (None, torch.bfloat16))
    assert stored.lm_head_weight.dtype == torch.float32
    assert torch.equal(half.lm_head_weight, stored.lm_head_weight.bfloat16())


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """One untied and sharded folder, written by transformers; never changed."""
    folder = tmp_path_factory.mktemp("model") / "pristine"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(THEIR_CONFIGS["llama"], dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **entries: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (lambda f: change_tensors(f, lambda t: t.pop(UP)), rf"lacks tensor {UP} of shape \[80, 48\]"),
    "missing layer": (lambda f: change_config(f, num_hidden_layers=4), r"lacks tensor model\.layers\.3\..* \(and 8 more\)"),
    "extra tensor": (
        lambda f: change_tensors(f, lambda t: t.update(stranger=torch.zeros(3))),
        r"model\.safetensors holds tensor stranger of shape \[3\]",
    ),
    "extra layer": (
        lambda f: change_config(f, num_hidden_layers=2),
        r"model\.layers\.2\..*which a llama of 2 layers doesn't have",
    ),
    "mis-shaped": (
        lambda f: change_tensors(f, lambda t: t.update({UP: torch.zeros(48, 80)})),
        rf"model\.safetensors: tensor {UP} has shape \[48, 80\], config\.json asks for \[80, 48\]",
    ),
    "integers": (
        lambda f: change_tensors(f, lambda t: t.update({UP: torch.zeros(80, 48, dtype=torch.int8)})),
        rf"tensor {UP} is I8; only F32, BF16, F16 can be loaded",
    ),
    "mixed dtypes": (
        lambda f: change_tensors(f, lambda t: t.update({UP: t[UP].half()})),
        rf"tensor {UP} is F16, but model\.embed_tokens\.weight is F32",
    ),
    "other dtype than claimed": (
        lambda f: change_config(f, dtype="bfloat16"),
        r"says dtype 'bfloat16', but the tensors are float32",
    ),
    "a head that should be tied": (
        lambda f: change_config(f, tie_word_embeddings=True),
        r"lm_head\.weight differs from model\.embed",
    ),
    "truncated weights": (
        lambda f: os.truncate(f / "model.safetensors", 100_000),
        r"model\.safetensors is not a complete safetensors file",
    ),
    "empty weights": (lambda f: os.truncate(f / "model.safetensors", 0), r"is not a complete safetensors file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"holds neither model\.safetensors nor"),
    "adapter beside": (
        lambda f: save_file({"a": torch.zeros(1)}, f / "adapter_model.safetensors"),
        r"adapter_model\.safetensors belongs to no index",
    ),
    "two sets of weights": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
        r"holds both model\.safetensors and model\.safetensors\.index\.json",
    ),
    "corrupt config": (lambda f: (f / "config.json").write_text('{"model_type": "lla'), r"config\.json can't be read as JSON"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), r"config\.json can't be read as JSON"),
    "config of another kind": (lambda f: (f / "config.json").write_text("[]"), r"holds a list: it must be a JSON object"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
    "no folder": (shutil.rmtree, r"does not exist"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_folder_is_one_clear_error(damage, message, folder):
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_hf_folder(folder, None, "cpu")


def test_a_stored_copy_of_the_tied_head_is_accepted(folder):
    change_config(folder, tie_word_embeddings=True)
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = load_hf_folder(folder, None, "cpu")
    assert model.lm_head_weight is model.embedding.weight


def test_an_index_that_disagrees_with_its_shards(folder):
    model = load_hf_folder(folder, None, "cpu")
    sharded = folder.parent / "sharded"
    save_hf_folder(model, sharded, tokenizer_from=None, max_shard_bytes=60_000)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    first = index["weight_map"].pop(UP)
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=rf"lists {UP} in None, but it is in {first}"):
        load_hf_folder(sharded, None, "cpu")
    (sharded / first).unlink()
    with pytest.raises(InputError, match=rf"{first} is missing"):
        load_hf_folder(sharded, None, "cpu")


def test_an_export_never_overwrites(folder):
    model = load_hf_folder(folder, None, "cpu")
    with pytest.raises(InputError, match="exists already"):
        save_hf_folder(model, folder, tokenizer_from=None)


def test_a_full_disk_leaves_nothing_behind(folder):
    """A limit on the size of files stands in for the full disk: the write fails in the middle of the weights."""
    model = load_hf_folder(folder, None, "cpu")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(InputError, match=r"can't write .*export"):
            save_hf_folder(model, folder.parent / "export", tokenizer_from=folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
