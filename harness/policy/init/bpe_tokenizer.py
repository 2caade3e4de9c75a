"""A byte-level BPE tokenizer (Sennrich et al. 2016; bytes as in GPT-2) trained here, split into words as Qwen2's is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from klab.harness.policy.char_tokenizer import EOS, PAD, transformers_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2's tokenizer splits text before merging: a word with the space before it, every digit by itself."""


def bpe_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """At most `size` tokens: `<pad>` (0), `<end>` (1), the 256 bytes, and the merges that these texts ask for most.

    Every text can be encoded, and decoding gives it back; no token marks its beginning.
    """
    backend = Tokenizer(BPE())
    words = Split(Regex(QWEN2_WORDS), behavior="isolated")
    backend.pre_tokenizer = Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size, special_tokens=[PAD, EOS], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return transformers_tokenizer(backend)
