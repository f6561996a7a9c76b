"""A small causal model whose losses depend on context and position, and small documents to measure it on."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanarch.contract.cost import Cost
from titanarch.contract.init import Init
from titanarch.contract.model import Model, ModelConfig, Objective
from titanarch.contract.sequence import SequenceInfo
from titanarch.data.batch import IGNORED, Batch
from titanarch.data.config import DataConfig
from titanarch.data.tokenizers import Tokenizer, build_tokenizer
from titanarch.evaluate.config import EvaluationConfig
from titanarch.evaluate.evaluation import EvaluationResult, evaluate

CPU = torch.device("cpu")
TRAIN_SEQ_LEN = 16
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "that",
    "it",
    "was",
    "his",
    "he",
    "with",
    "as",
    "for",
    "had",
    "you",
    "not",
    "be",
    "her",
    "naïve",
    "日本",
]


def texts(n: int, *, seed: int, longest: int) -> list[str]:
    """Documents of one word to about ``longest`` bytes."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest // 4))) for _ in range(n)]


def data_of(folder: Path, train: list[str], validation: list[str], tokenizer: str = "bytes", **more: Any) -> DataConfig:
    """[data] over the documents ``train`` and ``validation``, written below ``folder``."""
    sources = {}
    for name, documents in (("source", train), ("validation", validation)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
        sources[name] = {"kind": "jsonl", "paths": [str(path)]}
    return DataConfig.model_validate({"cache_dir": str(folder / "cache"), "tokenizer": tokenizer, "processes": 1, **sources, **more})


def two_rows() -> Batch:
    """Rows 7 and 9 of four tokens; in the second one another document begins at its third token."""
    return Batch(
        tokens_BT=torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]]),
        labels_BT=torch.tensor([[6, 7, 8, 9], [2, IGNORED, 4, 1]]),
        position_BT=torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]]),
        document_BT=torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]]),
        row_B=torch.tensor([7, 9]),
        cu_seqlens=torch.tensor([0, 4, 6, 8, 8, 8, 8, 8, 8], dtype=torch.int32),
        packed=True,
    )


class TinyModel(Model):
    """Fading sums of embeddings, a sine of the position, a head. Its dropout must be off when it is measured."""

    Config = ModelConfig
    flavors: dict[str, dict[str, Any]] = {}

    def __init__(self, vocab_size: int, *, longest: int | None = None) -> None:
        nn.Module.__init__(self)
        self.embedding = nn.Embedding(vocab_size, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8)])
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, vocab_size)
        self.longest = longest
        self.forwards: list[tuple[int, ...]] = []
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    @staticmethod
    def cost(config: ModelConfig, vocab_size: int, seq_len: int) -> Cost:
        raise NotImplementedError

    def blocks(self) -> Iterator[nn.Module]:
        return iter(self.layers)

    def reset_parameters(self, init: Init) -> None:
        raise NotImplementedError

    def forward(self, tokens_BT: Tensor, seq: SequenceInfo, labels_BT: Tensor, z_weight: float = 0.0) -> Objective:
        raise NotImplementedError

    def max_length(self) -> int | None:
        return self.longest

    def logits(self, tokens_BT: Tensor, seq: SequenceInfo) -> Tensor:
        assert seq.seed is None, "nothing is drawn where a model is measured"
        self.forwards.append(tuple(tokens_BT.shape))
        index_T = torch.arange(tokens_BT.shape[1])
        distance_TT = index_T[:, None] - index_T
        fading_TT = torch.where(distance_TT >= 0, 0.9 ** distance_TT.clamp(min=0), 0.0)
        same_BTT = seq.document_BT[:, :, None] == seq.document_BT[:, None]
        x_BTD = (fading_TT * same_BTT) @ self.embedding(tokens_BT) + torch.sin(seq.position_BT / 7.0)[:, :, None]
        return self.head(self.dropout(torch.tanh(self.layers[0](x_BTD)))).float()

    def token_losses(self, tokens_BT: Tensor, seq: SequenceInfo, labels_BT: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(tokens_BT, seq).transpose(1, 2), labels_BT, ignore_index=-100, reduction="none")


def loss_of(model: TinyModel, context: list[int], target: int) -> float:
    """Nats of ``target`` after ``context``, alone in a row, in fp64 from the logits."""
    modes, _ = model.training, model.eval()
    with torch.no_grad():
        logits_BTV = model.logits(torch.tensor([context]), SequenceInfo.whole(1, len(context)))
    model.train(modes)
    return float(-torch.log_softmax(logits_BTV[0, -1].double(), -1)[target])


def run(
    model: Model, config: EvaluationConfig, data: DataConfig, *, rank: int = 0, degree: int = 1, reduce: Any = lambda x: x
) -> EvaluationResult:
    return evaluate(
        model,
        config=config,
        data=data,
        tokenizer=build_tokenizer(data.tokenizer),
        train_seq_len=TRAIN_SEQ_LEN,
        device=CPU,
        dp_rank=rank,
        dp_degree=degree,
        reduce=reduce,
    )


def tokens_of(data: DataConfig, documents: list[str]) -> list[list[int]]:
    tokenizer: Tokenizer = build_tokenizer(data.tokenizer)
    return [tokenizer.encode(text).tolist() for text in documents]
