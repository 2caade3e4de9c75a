"""A character-level tokenizer that is an ordinary `PreTrainedTokenizerFast`: saved and loaded like any other."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from klab.grid.errors import UserError

PAD, EOS, UNKNOWN = "<pad>", "<end>", "<unk>"


def character_tokenizer(alphabet: str, size: int | None = None) -> PreTrainedTokenizerFast:
    """One token per character, after `<pad>` (0), `<end>` (1) and `<unk>` (2); no beginning-of-sequence token.

    Args:
        alphabet: the characters in the order of their ids, none repeated.
        size: vocabulary size, reached by adding unused tokens; None adds none.

    Raises:
        UserError: a repeated character, or an alphabet larger than `size`.
    """
    if len(set(alphabet)) != len(alphabet) or not alphabet:
        raise UserError("an alphabet needs at least one character, each once", key="task.alphabet", value=alphabet)
    words = [PAD, EOS, UNKNOWN, *alphabet]
    if size is not None and size < len(words):
        raise UserError(f"{len(words)} tokens exceed a vocabulary of {size}", key="task.alphabet", value=alphabet)
    words += [f"<unused{i}>" for i in range(0 if size is None else size - len(words))]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
