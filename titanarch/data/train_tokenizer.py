"""Training a tokenizer on the documents of a source, by SentencePiece or by Hugging Face's tokenizers."""

import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heappop, heappush
from typing import Literal, NamedTuple

from titanarch.data.errors import DataError, data_error
from titanarch.data.sources import Document

TokenizerKind = Literal["sentencepiece", "hf-bpe"]

SENTENCE_BYTES = 16_384  # SentencePiece drops longer ones, so they are cut
THREADS = 4  # fixed, since sums of a unigram model's likelihoods are ordered by thread
MIN_HELD_OUT = 100  # of so many documents one is held out
END_TOKEN = "<|endoftext|>"

_SENTENCE_END = re.compile(r"(?<=[.;?!]) ")


class Sample(NamedTuple):
    """Texts to train on and texts held out from training, each in the source's order; ``n_documents``: those there were."""

    training: list[str]
    held_out: list[str]
    n_documents: int


def sample_texts(documents: Iterable[Document], *, max_bytes: int, seed: int, hold_out: bool) -> Sample:
    """Documents drawn by ``seed``, at most ``max_bytes`` of text in UTF-8; in memory, so that is the memory it takes.

    A document's chance does not depend on the others: those with the smallest keys stay, a key being a hash of seed and place.
    ``hold_out``: one document in a hundred, at least one of two, is kept from training. Raises DataError where nothing is left.
    """
    kept: list[tuple[int, int, str, int]] = []  # (-key, place, text, bytes): the largest key comes first
    total = n_documents = 0
    for place, document in enumerate(documents):
        n_documents += 1
        n_bytes = len(document.text.encode())
        heappush(kept, (-_key(seed, place), place, document.text, n_bytes))
        total += n_bytes
        while total > max_bytes:
            total -= heappop(kept)[3]
    chosen = sorted(kept, reverse=True)  # by key
    n_held_out = max(1, len(chosen) // MIN_HELD_OUT) if hold_out and len(chosen) > 1 else 0
    held_out, training = (sorted(part, key=lambda each: each[1]) for part in (chosen[:n_held_out], chosen[n_held_out:]))
    if not any(text for _, _, text, _ in training):
        raise data_error(f"no text to train a tokenizer on: of {n_documents} documents none fits into {max_bytes} bytes", key="data.source")
    return Sample([text for _, _, text, _ in training], [text for _, _, text, _ in held_out], n_documents)


def _key(seed: int, place: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {place}".encode()).digest()[:8], "big")


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines, cut at the ends of sentences, and those over SENTENCE_BYTES in pieces of at most so many bytes. No line ends in them."""
    for text in texts:
        for line in text.split("\n"):
            for sentence in filter(None, _SENTENCE_END.split(line)):
                yield from _pieces(sentence)


def _pieces(sentence: str) -> Iterator[str]:
    if len(sentence) * 4 <= SENTENCE_BYTES or len(sentence.encode()) <= SENTENCE_BYTES:
        yield sentence
    else:
        size = SENTENCE_BYTES // 4  # characters, of at most 4 bytes
        yield from (sentence[i : i + size] for i in range(0, len(sentence), size))


def train_sentencepiece(texts: Sequence[str], vocab_size: int, seed: int) -> bytes:
    """A unigram model of ``vocab_size`` pieces with fallback to bytes, as a .model file.

    Text comes back as it was: nothing is normalized, and a line end is a piece. Raises DataError where the text is too small.
    """
    import sentencepiece  # only where it is used

    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            max_sentence_length=SENTENCE_BYTES,
            num_threads=THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _cannot(vocab_size, str(error)) from error
    return model.getvalue()


def train_hf_bpe(texts: Sequence[str], vocab_size: int, seed: int) -> bytes:
    """A byte-level BPE of ``vocab_size`` tokens with the end-of-document token END_TOKEN, as a tokenizer.json.

    ``seed`` draws nothing here. Raises DataError where the text has too few pairs to merge.
    """
    import tokenizers  # only where it is used
    from tokenizers import decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size <= len(alphabet):
        raise _cannot(vocab_size, f"{len(alphabet)} bytes and {END_TOKEN} are tokens already")
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_TOKEN], initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(texts, trainer)
    if (found := model.get_vocab_size()) != vocab_size:
        raise _cannot(vocab_size, f"the text gives {found} tokens")
    return model.to_str().encode()


def _cannot(vocab_size: int, why: str) -> DataError:
    return data_error(f"cannot train a tokenizer of {vocab_size} tokens: {why}; give more text or another --vocab-size")


TRAINERS: dict[TokenizerKind, Callable[[Sequence[str], int, int], bytes]] = {"sentencepiece": train_sentencepiece, "hf-bpe": train_hf_bpe}
"""(texts, vocab_size, seed) -> the tokenizer's file."""

TABLES: dict[TokenizerKind, str] = {"sentencepiece": "sentencepiece", "hf-bpe": "hf"}
"""The kind in ``data.tokenizer`` that reads what is trained."""
