"""What more than one launch file puts together: the policy and the engine that generates with it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from strop.engine.batch import Group, Prompt
from strop.engine.config import InputError, Precision
from strop.engine.data.templates import Template, encode
from strop.engine.evaluate.benchmark import EvalConfig, Record, ask
from strop.engine.model.checkpoint import load_hf_folder
from strop.engine.model.sources import resolve_model
from strop.engine.model.transformer import Transformer
from strop.engine.model.weights import ModelWeights, bit_sum
from strop.engine.parallel.collectives import all_gather_objects
from strop.engine.parallel.mesh import Mesh
from strop.engine.protocols import Sampling
from strop.engine.reward.rules import Rewards
from strop.engine.rollout.engine import EngineConfig, InProcessEngine

EVALUATION_IDS = 2**62
"""Sample ids of evaluations start here, far above training's."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Policy:
    """A model with its tokenizer, from a Hugging Face folder."""

    folder: Path
    model: Transformer
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, name_or_path: str, precision: Precision, device: torch.device) -> "Policy":
        """Raises InputError for a folder that is not a whole model, or one without a tokenizer."""
        from transformers import AutoTokenizer  # seconds: a mistake on the command line needn't wait for it

        folder = resolve_model(name_or_path)
        model = load_hf_folder(folder, DTYPES[precision], device)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            cause = str(error).strip().splitlines()[0]
            raise InputError(f"{folder} has no tokenizer that can be read ({cause}): put its tokenizer.json there") from error
        return cls(folder, model, tokenizer)

    def checksum(self) -> str:
        """Order-independent sum of the bits of all weights, 16 hexadecimal digits."""
        return f"{sum(bit_sum(parameter) for parameter in self.model.parameters()) % 2**64:016x}"

    def engine(
        self,
        config: EngineConfig,
        template: Template,
        probe: Callable[[Tensor], Tensor],
        beat: Callable[[], None] = lambda: None,
    ) -> InProcessEngine:
        """A rollout engine whose weights are this model's storage; `sync_weights` makes it ready. beat: see InProcessEngine."""
        parameter = next(self.model.parameters())
        engine = InProcessEngine(
            self.model.config, self.tokenizer, lambda prompt: encode(prompt, self.tokenizer, template), config,
            parameter.device, parameter.dtype, probe, beat=beat,
        )  # fmt: skip
        engine.bind_weights(ModelWeights(self.model))
        return engine


def ask_everyone(
    engine: InProcessEngine, rewards: Rewards, prompts: Sequence[Prompt], config: EvalConfig, mesh: Mesh, seed: int
) -> list[Record]:
    """The records of all questions, in order, on every rank; each data-parallel rank asks its share."""

    def generate(questions: Sequence[Prompt], sampling: Sampling, ids: Sequence[int]) -> list[Group]:
        return engine.generate(questions, sampling, [EVALUATION_IDS + i for i in ids])

    dp = mesh.dp
    mine = ask(generate, rewards.score, prompts, config, answer=rewards.answer, seed=seed, rank=dp.rank, ranks=dp.size)
    records = [record for part in all_gather_objects(mine, dp) for record in part]
    return sorted(records, key=lambda record: record.ordinal)
