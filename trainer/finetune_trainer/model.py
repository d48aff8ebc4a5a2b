"""Loads the base model from a Hugging Face folder and prepares it for training: adapters, attention, checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from finetune_api.errors import ModelError, SpecError
from finetune_api.job import FinetuneJobSpec, Lora
from finetune_trainer import attention
from finetune_trainer.weights import inner_model

DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_NAMED: Final = 8  # names shown in an error before "and N more"


def load_model(path: str | Path, spec: FinetuneJobSpec, deepspeed_config: dict[str, Any]) -> nn.Module:
    """The model in `path`, in training precision, on the CPU; under ZeRO-3 already sharded over the workers.

    Every worker must call it. Adapters start from the job's seed.

    Raises:
        ModelError: no causal language model that transformers knows, no safetensors, weights missing or left over.
        SpecError: `method.lora.targetModules` names a layer that the model does not have, or its attention cannot be
            shared by `deepspeed.sequenceParallel` workers.
    """
    # transformers looks for this object through a weak reference while it loads, to shard each weight as it is read.
    zero3 = _announce_zero3(deepspeed_config) if deepspeed_config["zero_optimization"]["stage"] == 3 else None
    model: nn.Module = _from_pretrained(Path(path), DTYPES[spec.training.precision])
    if spec.method.tuning == "lora":
        torch.manual_seed(spec.training.seed)
        model = add_adapters(model, spec.method.lora)
    del zero3
    check_shared_sequence(model, spec.deepspeed.sequence_parallel)
    if supports_packed_attention(model):
        attention.register()
        inner_model(model).set_attn_implementation(attention.NAME)
    if spec.training.activation_checkpointing:
        recompute_activations(model, spec.training.recompute_every)
    return model


def recompute_activations(model: nn.Module, every: int) -> None:
    """Lets the first of each `every` blocks of a model compute its activations again in the backward pass."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    base = inner_model(model)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    blocks = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    for number, block in enumerate(blocks):
        block.gradient_checkpointing = number % every == 0


def _announce_zero3(config: dict[str, Any]) -> object:
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(config)


def _from_pretrained(path: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first_line = str(error).strip().split("\n", 1)[0]
        raise ModelError(
            f"the model does not load: {first_line}",
            where=str(path),
            hint="give a Hugging Face folder of a causal language model with config.json and safetensors weights",
        ) from error
    # transformers only warns and fills what is missing with random numbers.
    for what, keys in (
        ("missing from", info["missing_keys"]),
        ("unexpected in", info["unexpected_keys"]),
        ("of another shape in", {key[0] for key in info["mismatched_keys"]}),
    ):
        if keys:
            raise ModelError(
                f"{len(keys)} weights are {what} the checkpoint: {_some(keys)}",
                where=str(path),
                hint="the folder's config.json and safetensors files do not belong together; download it again",
            )
    return model


def add_adapters(model: Any, lora: Lora) -> Any:
    """Freezes `model` and puts low-rank adapters on its linear layers; they start as zero.

    Raises:
        SpecError: a name in `target_modules` fits no linear layer.
    """
    from peft import LoraConfig, get_peft_model

    every = lora.target_modules == ["all-linear"]
    if not every:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        unknown = [t for t in lora.target_modules if not any(n == t or n.endswith(f".{t}") for n in linear)]
        if unknown:
            raise SpecError(
                f"{unknown[0]!r} names no linear layer of the model",
                where="spec.method.lora.targetModules",
                hint=f"its linear layers are {', '.join(sorted({n.rsplit('.', 1)[-1] for n in linear}))}; "
                "or write all-linear",
            )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear" if every else list(lora.target_modules),
        task_type="CAUSAL_LM",
    )
    # Adapters stay in the model's precision: DeepSpeed keeps float32 masters of all that is trained.
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def supports_packed_attention(model: Any) -> bool:
    """Whether every attention layer is causal with at most a sliding window, and called through transformers'
    interface: then `attention.packed_attention` stands in for it."""
    base = inner_model(model)
    text = base.config.get_text_config()
    return (
        getattr(base, "_supports_attention_backend", False)
        and getattr(base, "_supports_sdpa", False)
        and set(getattr(text, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
        and getattr(text, "attn_logit_softcapping", None) is None
    )


def check_shared_sequence(model: Any, workers: int) -> None:
    """Raises SpecError when so many workers cannot share a sequence: in attention each takes its part of the heads."""
    if workers == 1:
        return
    where = "spec.deepspeed.sequenceParallel"
    heads, groups = _heads(model)
    if not supports_packed_attention(model):
        raise SpecError(
            f"the attention of {type(inner_model(model)).__name__} cannot be shared by several workers",
            where=where,
            hint="set it to 1; to save memory set training.activationCheckpointing or deepspeed.offload",
        )
    if workers not in (possible := sequence_shares(model)):
        raise SpecError(
            f"{workers} workers cannot share {heads} attention heads and {groups} key-value heads evenly",
            where=where,
            hint=f"this model's sequences can be shared by {', '.join(map(str, possible))}",
        )


def sequence_shares(model: Any) -> list[int]:
    """How many workers can share a sequence: each takes as many heads, and of keys and values too, or one of them."""
    heads, groups = _heads(model)
    possible = [n for n in range(1, heads + 1) if heads % n == 0 and (groups % n == 0 or n % groups == 0)]
    return possible if supports_packed_attention(model) else [1]


def _heads(model: Any) -> tuple[int, int]:
    """Heads of attention, and of keys and values."""
    config = inner_model(model).config.get_text_config()
    return config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def optimizer_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters for AdamW: matrices with weight decay, norms and biases (at most one dimension) without."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if len(full_shape(p)) > 1]
    others = [p for p in trainable if len(full_shape(p)) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The parameter's shape, also when ZeRO-3 has left this worker only a shard of it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _some(names: set[str]) -> str:
    shown = sorted(names)[:_NAMED]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
