"""Hugging Face model folders, in and out: `load_hf_folder`, `save_hf_folder`.

Reading is strict: every tensor of the folder must be one the config asks for, with its shape and the one dtype that the
folder claims, and nothing may be missing. Writing is atomic: a folder appears complete under its name or not at all.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import InputError
from . import names
from .config import ModelConfig
from .transformer import Transformer
from .weights import ModelWeights

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
"""Files beside the weights that an export takes along: the tokenizer and the generation defaults."""

_LOADABLE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def load_config(folder: Path) -> ModelConfig:
    """Read folder/config.json. Raises InputError where it is absent, not JSON, or describes what is not implemented."""
    return ModelConfig.from_hf(_read_json(folder / "config.json"), str(folder / "config.json"))


def load_hf_folder(folder: Path | str, dtype: torch.dtype | None, device: torch.device | str) -> Transformer:
    """The model in `folder`, its weights converted to `dtype` (None: as stored).

    Raises InputError for a missing, extra, mis-shaped or wrong-dtype tensor, a tied head that differs from the embedding,
    a truncated file or an unreadable config; the message names the tensor, what was found and expected, the file, the fix.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"model folder {folder} does not exist: give a Hugging Face folder")
    entries = _read_json(folder / "config.json")
    config = ModelConfig.from_hf(entries, str(folder / "config.json"))
    with ExitStack() as stack:
        stored = _open_tensors(folder, stack)
        stored_dtype = _check(stored, config, entries.get("dtype") or entries.get("torch_dtype"), folder)
        model = Transformer(config, dtype=dtype or stored_dtype, device=device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                file, path = stored[names.to_hf(name)]
                parameter.copy_(_read(file, path, names.to_hf(name)))
            if config.tie_embeddings and names.LM_HEAD in stored:
                _check_tied_head(stored)
    return model


def save_hf_folder(
    model: Transformer, folder: Path | str, *, tokenizer_from: Path | str | None, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write the model in its own dtype as a new folder, with the companion files (tokenizer, ...) of `tokenizer_from`.

    Raises InputError where the folder exists already or the disk refuses.
    """
    with new_folder(Path(folder)) as partial:
        write_model(model, partial, max_shard_bytes)
        if tokenizer_from is not None:
            for name in COMPANIONS:
                if (Path(tokenizer_from) / name).is_file():
                    shutil.copyfile(Path(tokenizer_from) / name, partial / name)


def write_model(model: Transformer, folder: Path, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write config.json and the weights into an existing folder. A tied head is not stored, as in transformers."""
    assert model.is_first and model.is_last, "a pipeline stage can't be written as a model"
    tensors = {meta.name for meta in ModelWeights(model).metadata() if meta.tied_to is None}
    shards = [
        {name: tensor.cpu().contiguous() for name, tensor in bucket if name in tensors}
        for bucket in ModelWeights(model).iter_full(max_shard_bytes)
    ]
    shards = [shard for shard in shards if shard]
    files = (
        [SINGLE] if len(shards) == 1 else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(model.config.to_hf(dtype), indent=2) + "\n")
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # safetensors gives it to the owner alone
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for shard in shards for tensor in shard.values())},
            "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in sorted(shard)},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` when the block ends well and disappears when it fails.

    Everything is on disk before the rename, so whoever sees `folder` sees it complete, after a power cut too.
    Raises InputError where `folder` exists already or the file system refuses (no space, no permission).
    """
    if folder.exists():
        raise InputError(f"{folder} exists already: choose another name or delete it")
    partial = folder.with_name(f".{folder.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.iterdir(), partial):
            _to_disk(path)
        partial.rename(folder)
        _to_disk(folder.parent)
    except (OSError, SafetensorError) as error:
        raise InputError(f"can't write {folder}: {error}; check free space and permissions") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {path.parent} is not a Hugging Face model folder") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path} can't be read as JSON ({error}): restore the file") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}: it must be a JSON object")
    return content


def _open_tensors(folder: Path, stack: ExitStack) -> dict[str, tuple[Any, Path]]:
    """Hugging Face name -> (open safetensors file, its path), for every tensor of every weight file in the folder."""
    has_index, has_single = (folder / INDEX).is_file(), (folder / SINGLE).is_file()
    if has_index and has_single:
        raise InputError(f"{folder} holds both {SINGLE} and {INDEX}: delete the one that is out of date")
    if not has_index and not has_single:
        raise InputError(f"{folder} holds neither {SINGLE} nor {INDEX}: strop reads safetensors only")
    weight_map = _read_json(folder / INDEX).get("weight_map") if has_index else None
    if has_index and not isinstance(weight_map, dict):
        raise InputError(f"{folder / INDEX} has no 'weight_map': restore the file")
    wanted = set(weight_map.values()) if weight_map is not None else {SINGLE}
    if unused := sorted({path.name for path in folder.glob("*.safetensors")} - wanted):
        raise InputError(f"{folder / unused[0]} belongs to no index: merge it into the model or move it elsewhere")
    stored: dict[str, tuple[Any, Path]] = {}
    for name in sorted(wanted):
        path = folder / name
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except FileNotFoundError:
            raise InputError(f"{path} is missing, though {INDEX} lists it: fetch the model again") from None
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is not a complete safetensors file ({error}): fetch it again") from None
        stored |= {key: (file, path) for key in file.keys()}  # noqa: SIM118 (not a dict)
    if weight_map is not None:
        found = {key: path.name for key, (_, path) in stored.items()}
        for key in sorted(weight_map.keys() | found.keys()):
            if weight_map.get(key) != found.get(key):
                where = f"lists {key} in {weight_map.get(key)}, but it is in {found.get(key)}"
                raise InputError(f"{folder / INDEX} {where}: fetch the model again")
    return stored


def _check(stored: Mapping[str, tuple[Any, Path]], config: ModelConfig, claimed: Any, folder: Path) -> torch.dtype:
    """Compare every stored tensor with what the config asks for; returns the one dtype they all have."""
    skeleton = Transformer(config, dtype=torch.float32, device="meta")
    expected = {names.to_hf(name): list(parameter.shape) for name, parameter in skeleton.named_parameters()}
    if config.tie_embeddings and names.LM_HEAD in stored:
        expected[names.LM_HEAD] = expected[names.EMBEDDING]
    if missing := sorted(expected.keys() - stored.keys()):
        raise InputError(
            f"{folder} lacks tensor {missing[0]} of shape {expected[missing[0]]}{_and_more(missing)}: "
            "its config.json belongs to another model, or a file was left out"
        )
    if extra := sorted(stored.keys() - expected.keys()):
        file, path = stored[extra[0]]
        raise InputError(
            f"{path} holds tensor {extra[0]} of shape {file.get_slice(extra[0]).get_shape()}{_and_more(extra)}, "
            f"which a {config.family} of {config.num_layers} layers doesn't have: correct config.json or remove the tensor"
        )
    by_label = {label: dtype for dtype, label in _LOADABLE.items()}
    first = None
    for name, shape in expected.items():
        file, path = stored[name]
        found = file.get_slice(name)
        if found.get_shape() != shape:
            raise InputError(
                f"{path}: tensor {name} has shape {found.get_shape()}, config.json asks for {shape}: "
                "the two belong to different models"
            )
        dtype = by_label.get(found.get_dtype())
        if dtype is None:
            raise InputError(f"{path}: tensor {name} is {found.get_dtype()}; only {', '.join(by_label)} can be loaded")
        first = first or (name, dtype)
        if dtype != first[1]:
            raise InputError(
                f"{path}: tensor {name} is {found.get_dtype()}, but {first[0]} is {_LOADABLE[first[1]]}: "
                "convert the folder to one dtype"
            )
    assert first is not None
    actual = str(first[1]).removeprefix("torch.")
    if claimed is not None and claimed != actual:
        raise InputError(f"{folder / 'config.json'} says dtype {claimed!r}, but the tensors are {actual}: correct config.json")
    return first[1]


def _and_more(listed: list[str]) -> str:
    return f" (and {len(listed) - 1} more)" if len(listed) > 1 else ""


def _read(file: Any, path: Path, name: str) -> Tensor:
    try:
        return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: tensor {name} can't be read ({error}): fetch the file again") from None


def _check_tied_head(stored: Mapping[str, tuple[Any, Path]]) -> None:
    embedding, head = (_read(*stored[name], name) for name in (names.EMBEDDING, names.LM_HEAD))
    if not torch.equal(embedding, head):
        raise InputError(
            f"{stored[names.LM_HEAD][1]}: {names.LM_HEAD} differs from {names.EMBEDDING}, but config.json says "
            "tie_word_embeddings true: set it to false, or drop the tensor"
        )
