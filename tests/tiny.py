"""Tiny models made from scratch, with a real tokenizer and chat template: `from tests.tiny import tiny_llama`.

Everything is deterministic: the same arguments give the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

BOS: Final = "<|begin|>"
TURN: Final = "<|im_start|>"
END: Final = "<|im_end|>"  # ends a turn; also the eos token, as in ChatML models
PAD: Final = "<|pad|>"
SPECIAL: Final = (BOS, TURN, END, PAD)  # the first entries of the vocabulary, in this order

CHATML: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Enough English and Python for a few hundred merges.
_CORPUS: Final = (
    "What's your first name? My first name is Sharon. I'm sorry, I don't know. How do I sort a list in Python?",
    "Use sorted() to return a new list, or list.sort() to sort the list in place. The capital of France is Paris.",
    "def function(argument): return argument + 1  # a comment about the value of the argument",
    "The quick brown fox jumps over the lazy dog. You are a helpful assistant. Please answer the question.",
    "import json; rows = [json.loads(line) for line in open(path)]; print(len(rows), 'rows')",
)


def tiny_tokenizer(folder: Path, vocabulary: int = 512, chat_template: str | None = CHATML) -> Path:
    """Writes a byte-level BPE tokenizer of at most `vocabulary` entries (260 at least), in Hugging Face's layout."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=END, pad_token=PAD)
    if chat_template is not None:
        fast.chat_template = chat_template
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    return folder


def tiny_llama(
    folder: Path, hidden: int = 64, layers: int = 2, vocabulary: int = 512, seed: int = 0, dtype: str = "float32"
) -> Path:
    """Writes a randomly initialised Llama with its tokenizer, in Hugging Face's layout; returns `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny_tokenizer(folder, vocabulary)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 32, 2),
        num_key_value_heads=max(hidden // 64, 1),
        max_position_embeddings=2048,
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(END),
        pad_token_id=SPECIAL.index(PAD),
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder
