"""Train the two 8,192-piece tokenizers of the package on the corpus's training split; about a minute on two cores.

python scripts/corpus/train_tokenizers.py titanarch/data/corpus/corpus.jsonl.gz OUT
"""

import argparse
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 8192


def training_texts(corpus: Path) -> list[str]:
    with gzip.open(corpus, "rt", encoding="utf-8") as lines:
        return [item["text"] for item in map(json.loads, lines) if item["split"] == "train"]


def sentences(texts: list[str]) -> Iterator[str]:
    """Pieces that SentencePiece takes: an address is one line of up to 217 KB, so it is cut at ends of sentences."""
    for text in texts:
        for line in text.split("\n"):
            yield from filter(None, re.split(r"(?<=[.;?!]) ", line))


def train_unigram(texts: list[str], out: Path) -> None:
    """A SentencePiece unigram model that gives every text back: bytes for rare characters, all spaces kept."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(texts),
        model_prefix=str(out / f"spm_unigram_{VOCAB_SIZE}"),
        model_type="unigram",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=0.9999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["\n"],
        max_sentence_length=16384,
        num_threads=2,
        minloglevel=2,
    )


def train_byte_bpe(texts: list[str], out: Path) -> None:
    """A byte-level BPE in the Hugging Face format, with <|endoftext|> to end a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(out / f"hf_bytebpe_{VOCAB_SIZE}.json"))


def main() -> None:
    arguments = argparse.ArgumentParser(description="Train the tokenizers of the package.")
    arguments.add_argument("corpus", type=Path, help="corpus.jsonl.gz")
    arguments.add_argument("out", type=Path, help="folder to write to")
    given = arguments.parse_args()
    texts = training_texts(given.corpus)
    train_unigram(texts, given.out)
    train_byte_bpe(texts, given.out)


if __name__ == "__main__":
    main()
