"""The dimensions and the vocabulary of `tiny`, the model for trying things out; `sources` makes it. No torch here: a plan of it
needs none."""

from .config import ModelConfig

SPECIAL_PIECES = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")
PIECES = [*SPECIAL_PIECES, "\n", *map(chr, range(32, 127))]
"""The vocabulary."""
TINY_CONFIG = ModelConfig(  # 1.3M parameters
    family="llama",
    vocab_size=len(PIECES),
    hidden_size=144,
    intermediate_size=432,
    num_layers=5,
    num_heads=6,
    num_kv_heads=2,
    head_dim=24,
    max_positions=1024,
    norm_eps=1e-5,
    tie_embeddings=True,
    eos_ids=(PIECES.index("<eos>"),),
    bos_id=PIECES.index("<bos>"),
    pad_id=PIECES.index("<pad>"),
)
