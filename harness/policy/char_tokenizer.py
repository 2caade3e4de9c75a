"""A character-level tokenizer without transformers, which takes seconds to import; transformers reads its files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

from klab.grid.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<end>", "<unk>"
TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"

_SETTINGS = {
    "backend": "tokenizers",
    "clean_up_tokenization_spaces": False,
    "eos_token": EOS,
    "model_input_names": ["input_ids", "attention_mask"],
    "model_max_length": 1000000000000000019884624838656,
    "pad_token": PAD,
    "padding_side": "left",
    "tokenizer_class": "TokenizersBackend",
    "unk_token": UNKNOWN,
}
"""What `tokenizer_config.json` says of every character tokenizer, as transformers writes it."""

_INCIDENTAL = ("is_local", "local_files_only")
"""Settings with which transformers notes where it read a tokenizer."""

_FURTHER_FILES = ("chat_template.jinja", "chat_template.json", "added_tokens.json", "special_tokens_map.json")
"""With any of these, a folder has another tokenizer than the one that was written here."""


class CharacterTokenizer:
    """One token per character, after `<pad>` (0), `<end>` (1) and `<unk>` (2); no beginning-of-sequence token.

    It has as much of transformers' `PreTrainedTokenizerFast` as policies of the stacked engine ask for, and gives what
    that one gives.

    Attributes:
        name_or_path: the folder that it was read from.
        vocab_size: number of tokens.
    """

    chat_template: None = None
    pad_token_id, eos_token_id, unk_token_id = 0, 1, 2
    all_special_ids = (1, 2, 0)

    def __init__(self, backend: Tokenizer, name_or_path: str = "") -> None:
        self._backend = backend
        self.name_or_path = name_or_path
        self.vocab_size = int(backend.get_vocab_size())

    @classmethod
    def of_alphabet(cls, alphabet: str, size: int | None = None) -> CharacterTokenizer:
        """A new tokenizer.

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
        return cls(_backend([*words, *(f"<unused{i}>" for i in range(0 if size is None else size - len(words)))]))

    @classmethod
    def read(cls, folder: str | Path) -> CharacterTokenizer | None:
        """The tokenizer of a folder that `save_pretrained` wrote; None where the folder has another one."""
        path = Path(folder)
        try:
            settings = json.loads((path / SETTINGS).read_text())
            written = json.loads((path / TOKENIZER).read_text())
            vocabulary = written["model"]["vocab"]
            words = sorted(vocabulary, key=vocabulary.__getitem__)
            settings = {name: value for name, value in settings.items() if name not in _INCIDENTAL}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        if settings != _SETTINGS or any((path / name).exists() for name in _FURTHER_FILES):
            return None
        if words[:3] != [PAD, EOS, UNKNOWN] or json.loads(_backend(words).to_str()) != written:
            return None
        return cls(_backend(words), str(folder))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files that transformers' tokenizers have."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(path / TOKENIZER))
        (path / SETTINGS).write_text(json.dumps(_SETTINGS, indent=2) + "\n")

    def for_transformers(self) -> PreTrainedTokenizerFast:
        """The same as a tokenizer of transformers."""
        return transformers_tokenizer(self._backend, unk_token=UNKNOWN)

    def __len__(self) -> int:
        return self.vocab_size

    def __call__(self, texts: str | Sequence[str], add_special_tokens: bool = True) -> dict[str, Any]:
        """Token ids of a text, or of each of several, as `input_ids`."""
        if isinstance(texts, str):
            return {"input_ids": self._backend.encode(texts, add_special_tokens=add_special_tokens).ids}
        found = self._backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return {"input_ids": [each.ids for each in found]}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def convert_ids_to_tokens(self, token: int) -> str | None:
        found: str | None = self._backend.id_to_token(token)
        return found


def _backend(words: Sequence[str]) -> Tokenizer:
    """A tokenizer with these words in the order of their ids, the special ones first."""
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    backend.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in (PAD, EOS, UNKNOWN)])
    backend.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.post_processor = TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    backend.decoder = decoders.Fuse()
    return backend


def transformers_tokenizer(backend: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    """A trained backend as a tokenizer of transformers, padded on the left with `<pad>` and ended by `<end>`; `special`
    names further special tokens."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        **special,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
