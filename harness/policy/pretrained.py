"""What every checkpoint folder has beside its weights: configuration, tokenizer, generation configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from klab.grid.errors import UserError
from klab.harness.policy.char_tokenizer import CharacterTokenizer
from klab.harness.policy.stated_config import StatedConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GENERATION_CONFIG = "generation_config.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_GENERIC_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Tokenizer classes without rules of their own."""


def model_folder(
    model: str,
    revision: str | None,
    *,
    allow_patterns: list[str] | None = None,
    ignore_patterns: list[str] | None = None,
) -> Path:
    """The folder of a pretrained model: the one named, or the hub's as it is cached here, downloaded if need be.

    Args:
        allow_patterns, ignore_patterns: which files of a model on the hub are needed, and which are not.

    Raises:
        UserError: there is no such folder or model, or a revision is given for a folder.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise UserError("a folder has no revisions, a model on the hub has", key="policy.revision", value=revision)
        return path
    if path.is_absolute() or model.startswith("."):
        raise UserError(
            "no such folder",
            key="policy.model",
            value=model,
            hint=f"klab pretrain GRID --out {model} makes a small one from a task's own text.",
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        )
    except Exception as error:  # the hub client raises many kinds, all meaning that the model cannot be had
        reason = [*str(error).strip().splitlines(), type(error).__name__][0]
        problem = f"neither a folder nor a model that can be downloaded: {reason}"
        raise UserError(problem, key="policy.model", value=model) from error


def checkpoint_config(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """What `read_config` gives of a folder or hub id; without transformers where it is a tiny policy's."""
    return StatedConfig.read(folder) or read_config(folder, trust_remote_code)


def checkpoint_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """What `read_tokenizer` gives of a folder or hub id; without transformers where it is a tiny policy's."""
    found: Any = CharacterTokenizer.read(folder) or read_tokenizer(folder, trust_remote_code)
    return cast("PreTrainedTokenizerFast", found)


def read_config(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a folder or hub id.

    Args:
        trust_remote_code: whether Python code of the checkpoint may run.

    Raises:
        UserError: there is none, or it needs code that is not trusted.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if not trust_remote_code and "custom code" in str(error):
            raise UserError(
                "the model brings Python code of its own, which is run only where you say so",
                file=folder,
                key="policy.trust_remote_code",
                value=False,
            ) from error
        raise UserError(f"no readable model configuration: {first_line(error)}", file=folder) from error


def read_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or hub id.

    One whose class has no rules of its own is read from its `tokenizer.json` alone: `AutoTokenizer` would replace its
    way to split text by the one that the model's architecture usually has.

    Args:
        trust_remote_code: whether Python code of the checkpoint may run.

    Raises:
        UserError: no readable tokenizer.
    """
    if _tokenizer_class(Path(folder)) in _GENERIC_TOKENIZERS:
        from transformers import PreTrainedTokenizerFast as Loader
    else:
        from transformers import AutoTokenizer as Loader  # type: ignore[assignment]
    loader: Any = Loader
    try:
        return cast("PreTrainedTokenizerFast", loader.from_pretrained(str(folder), trust_remote_code=trust_remote_code))
    except (OSError, ValueError) as error:
        raise UserError(f"no readable tokenizer: {first_line(error)}", file=folder) from error


def _tokenizer_class(folder: Path) -> str | None:
    try:
        found: str | None = json.loads((folder / "tokenizer_config.json").read_text()).get("tokenizer_class")
    except (OSError, ValueError, AttributeError):
        return None
    return found


def read_generation_config(folder: str | Path) -> dict[str, Any] | None:
    """The contents of a checkpoint's `generation_config.json`; None where there is no such file.

    Raises:
        UserError: it is not a JSON mapping.
    """
    file = Path(folder) / GENERATION_CONFIG
    try:
        found = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"cannot be read: {error}", file=file) from error
    if not isinstance(found, dict):
        raise UserError("not a mapping", file=file)
    return found


def write_generation_config(folder: Path, generation_config: Mapping[str, Any] | None) -> None:
    """The inverse of `read_generation_config`."""
    if generation_config is not None:
        (folder / GENERATION_CONFIG).write_text(json.dumps(generation_config, indent=2) + "\n")


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """Check that the model's embedding has a row for every token of the vocabulary (special tokens apart).

    Raises:
        UserError: it has not.
    """
    if tokenizer.vocab_size > vocab_size:
        raise _wrong_tokenizer(tokenizer, vocab_size, f"it has {tokenizer.vocab_size} tokens")


def check_ids(ids: Sequence[int], tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """Check that the model's embedding has a row for every one of some token ids.

    Raises:
        UserError: it has not.
    """
    largest = max(ids, default=0)
    if largest >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise _wrong_tokenizer(tokenizer, vocab_size, f"it gives token {largest} ({token!r})")


def _wrong_tokenizer(tokenizer: PreTrainedTokenizerFast, vocab_size: int, found: str) -> UserError:
    return UserError(
        f"the tokenizer does not belong to the model: {found}, the model's embedding has {vocab_size}",
        file=tokenizer.name_or_path,
        key="policy.model",
        hint="Take the tokenizer that the model was trained with, or enlarge the model's embedding.",
    )


def first_line(error: Exception) -> str:
    """The first line of an error's message, its type if it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
