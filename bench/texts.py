"""Which texts do benchmarks give to models with random weights? Words of which each is one token, from all over a vocabulary."""

import itertools
import random

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

FIRST, SECOND, THIRD = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz", "0123456789!#$%&()*+,-./:;<=>?@^_~"


def make_tokenizer(entries: int | None = None) -> transformers.PreTrainedTokenizerFast:
    """Byte pairs, as in most models, of which every word of a capital, a letter and a sign is one token.

    With `entries` the vocabulary has so many: words of a fourth character fill it up. Raises ValueError where it cannot.
    """
    characters = [*FIRST, *SECOND, *THIRD]
    pairs = [(one, two) for one in FIRST for two in SECOND]
    triples = [(one + two, three) for one, two in pairs for three in THIRD]
    merges = [*pairs, *triples]
    if entries is not None:
        missing = entries - 2 - len(characters) - len(merges)
        if not 0 <= missing <= len(triples) * len(SECOND):
            raise ValueError(f"a vocabulary of {entries} entries cannot be made: ask for some more or fewer")
        fourth = ((one + two, three) for one, two in triples for three in SECOND)
        merges += itertools.islice(fourth, missing)
    tokens = ["<pad>", "<unk>", *characters, *(one + two for one, two in merges)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers does not annotate it
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side="left", model_max_length=65_536
    )


def words(count: int, seed: int) -> str:
    """A text of so many tokens, from all over the vocabulary: weights that nobody has touched do not count as memory."""
    chance = random.Random(seed)
    return " ".join(chance.choice(FIRST) + chance.choice(SECOND) + chance.choice(THIRD) for _ in range(count))
