"""The base model's folder and tokenizer, checked before a weight is loaded, so that a GPU never waits for a mistake."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from jinja2 import TemplateError

from finetune_api.errors import ModelError
from finetune_trainer.manifest import TokenizerFacts
from finetune_trainer.origin import file_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG_FILE: Final = "config.json"
_INDEX_FILE: Final = "model.safetensors.index.json"
TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_COPY: Final = "copy it from the model's origin"
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_model_folder(folder: Path) -> dict[str, Any]:
    """Checks that a Hugging Face folder is whole and safe to load; returns its config.json.

    Raises:
        ModelError: config.json, tokenizer or weights are missing, weights are pickles, an index names a file that is
            not there, or the model wants to run code of its own.
    """
    if not folder.is_dir():
        raise ModelError("there is no such model folder", where=str(folder), hint="check spec.model.source")
    config = _read_object(folder / CONFIG_FILE)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(
            "the model folder has no tokenizer",
            where=str(folder / "tokenizer.json"),
            hint="copy tokenizer.json and tokenizer_config.json from the model's origin",
        )
    for name in (CONFIG_FILE, "tokenizer_config.json"):
        if (folder / name).is_file() and "auto_map" in _read_object(folder / name):
            raise ModelError(
                "the model brings Python code of its own, which is never run",
                where=f"{folder / name}: auto_map",
                hint="use a model whose architecture is part of transformers",
            )
    _check_weights(folder)
    return config


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads the folder's tokenizer: local files only, no code from the folder.

    Raises:
        ModelError: it does not load, or it cannot tell which characters a token came from.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises whatever its parsers raise
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"the tokenizer does not load: {type(error).__name__}: {reason}",
            where=str(folder),
            hint="copy the tokenizer's files again from the model's origin",
        ) from None
    if not tokenizer.is_fast:
        raise ModelError(
            "the tokenizer cannot map tokens to characters, so answers could not be told from questions",
            where=str(folder),
            hint="convert it to a fast tokenizer: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
        )
    return tokenizer


def tokenizer_sha256(folder: Path) -> str:
    """Hash over the names and contents of the tokenizer's files, its chat template among them."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase, folder: Path) -> TokenizerFacts:
    """What the manifest says about a tokenizer."""
    template = tokenizer.chat_template
    return TokenizerFacts(
        vocabulary_size=max(tokenizer.get_vocab().values()) + 1,
        eos_token_id=tokenizer.eos_token_id,
        end_of_turn_token_ids=end_of_turn(tokenizer),
        chat_template_sha256=None if template is None else hashlib.sha256(json.dumps(template).encode()).hexdigest(),
        sha256=tokenizer_sha256(folder),
    )


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that the chat template puts behind an answer; without a template, the end-of-text token.

    Empty when there is none: such a model could not learn to stop.

    Raises:
        ModelError: the template does not render a question and its answer.
    """
    if tokenizer.chat_template is None:
        return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    answer = "Paris"
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer}]
    try:
        text: str = tokenizer.apply_chat_template(chat, tokenize=False)
    except TemplateError as error:
        raise _bad_template(tokenizer, f"refuses a question with its answer: {error}") from None
    if answer not in text:
        raise _bad_template(tokenizer, "leaves answers out")
    behind = text[text.rindex(answer) + len(answer) :]
    special = special_tokens(tokenizer)
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    return [token for token in ids if token in special][:1]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The tokenizer's control tokens: id to text."""
    return {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def _bad_template(tokenizer: PreTrainedTokenizerBase, what: str) -> ModelError:
    return ModelError(
        f"the chat template {what}",
        where=f"{tokenizer.name_or_path}: chat template",
        hint="use the instruct version of the model, or correct its chat_template.jinja",
    )


def _check_weights(folder: Path) -> None:
    names = file_names(folder)
    if (folder / _INDEX_FILE).is_file():
        index = _read_object(folder / _INDEX_FILE)
        missing = sorted(set(index.get("weight_map", {}).values()) - names)
        if missing:
            raise ModelError(
                f"{len(missing)} of the model's weight files are missing, the first is {missing[0]}",
                where=str(folder / _INDEX_FILE),
                hint="finish the download of the model",
            )
    elif not any(name.endswith(".safetensors") for name in names):
        pickles = sorted(name for name in names if name.endswith(_PICKLES))
        raise ModelError(
            f"the weights are pickles ({pickles[0]}), which can run code when loaded" if pickles else "no weights",
            where=str(folder),
            hint="bring the weights as safetensors",
        )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"the model folder has no {path.name}", where=str(path), hint=_COPY) from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ModelError("the file is not a JSON object", where=str(path), hint=_COPY)
    return value
