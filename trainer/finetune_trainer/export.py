"""Writes the trained weights in Hugging Face's layout, loads them again, and compares logits before success is said.

export/model/      full tuning: the model
export/adapter/    lora: PEFT's adapter
export/merged/     lora with output.merge: the base model with the adapter merged in
export/export.json what was written and how the comparison came out; written last
"""

from __future__ import annotations

import ctypes
import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from finetune_api.errors import ExportError
from finetune_api.job import Output
from finetune_api.result import EXPORT_FILE, ExportCheck, ExportResult
from finetune_api.run import PREPARED, RunConfig
from finetune_trainer import attention
from finetune_trainer.dataset import PackedDataset
from finetune_trainer.distributed import World
from finetune_trainer.manifest import read_manifest, write_json
from finetune_trainer.model import DTYPES
from finetune_trainer.model_card import base_model
from finetune_trainer.weights import ADAPTER, inner_model, on_rank_0, write_adapter, write_model

if TYPE_CHECKING:
    from peft import PeftModel

PROBE_TOKENS: Final = 128

# Largest difference of a logit over the largest logit. Rounding each of the weights and activations of a deep model
# to 8 (bf16) or 11 (fp16) bits moves logits by a few units in the last place; in fp32 only the order of sums differs.
BOUNDS: Final = {torch.bfloat16: 2**-4, torch.float16: 2**-7, torch.float32: 1e-4}

# Copied byte for byte, so that text becomes the same tokens as in training.
_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)


def export(model: PreTrainedModel | PeftModel, run: RunConfig, folder: Path, world: World) -> None:
    """Writes and checks `folder`. Collective: every rank calls it, with the trained model in any ZeRO stage.

    Raises:
        ExportError: on all ranks; the weights do not load again or give other logits than `model`.
    """
    started = time.monotonic()
    _give_freed_memory_back()
    tokens = probe_tokens(run)
    trained = logits(model, tokens, world.device)
    dtype = output_dtype(run.spec.output, Path(run.model_path))
    coarser = max((inner_model(model).dtype, dtype), key=BOUNDS.__getitem__)

    on_rank_0(world, lambda: _clear(folder))
    names = (
        ["adapter", *(["merged"] if run.spec.output.merge else [])] if inner_model(model) is not model else ["model"]
    )
    checks = []
    for name in names:
        target = folder / name
        on_rank_0(world, lambda: _write_companions(model, run, target, dtype))  # noqa: B023
        if name == "adapter":
            write_adapter(cast("PeftModel", model), target, dtype, world)
        else:
            write_model(model, target, dtype, world)
        checks.append(on_rank_0(world, lambda: _check(run, target, tokens, trained, BOUNDS[coarser], world.device)))  # noqa: B023

    def finish() -> None:
        result = ExportResult(
            dtype=str(dtype).removeprefix("torch."), checks=checks, seconds=time.monotonic() - started
        )
        write_json(folder / EXPORT_FILE, result.model_dump(mode="json"))

    on_rank_0(world, finish)


def _give_freed_memory_back() -> None:
    """Returns to the system what malloc kept after the steps: rank 0 is about to load the model a second time."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


def logits(model: torch.nn.Module, tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Logits in fp32 on the CPU, of shape (positions, vocabulary). Collective when ZeRO-3 has partitioned the model."""
    inner = inner_model(cast("PreTrainedModel | PeftModel", model))
    packed = inner.config._attn_implementation == attention.NAME
    training = model.training
    try:
        model.eval()
        if packed:  # it wants the documents' lengths; one document needs no packing
            inner.set_attn_implementation("sdpa")
        with torch.no_grad():
            return cast(torch.Tensor, model(input_ids=tokens.to(device), use_cache=False).logits[0].float().cpu())
    finally:
        model.train(training)
        if packed:
            inner.set_attn_implementation(attention.NAME)


def probe_tokens(run: RunConfig) -> torch.Tensor:
    """The first tokens of the evaluation rows, or of the training rows without any; shape (1, at most 128)."""
    folder = Path(run.work) / PREPARED
    split = read_manifest(folder).splits
    rows = PackedDataset(folder, "evaluation" if split.evaluation.sequences else "train")
    return torch.from_numpy(rows[0].input_ids[:PROBE_TOKENS].astype("int64"))[None]


def output_dtype(output: Output, base: Path) -> torch.dtype:
    """The type of weights on disk: what the job says, or the base model's own."""
    if output.dtype != "auto":
        return DTYPES[output.dtype]
    dtype = AutoConfig.from_pretrained(base, local_files_only=True).dtype
    return dtype if dtype in BOUNDS else torch.float32


def generation_config(run: RunConfig) -> dict[str, Any]:
    """The base model's, with the tokens that end an assistant turn among those that end generation.

    As a dictionary: transformers refuses to write some of the files that models come with.
    """
    base = Path(run.model_path)
    if (base / "generation_config.json").exists():
        config: dict[str, Any] = json.loads((base / "generation_config.json").read_bytes())
    else:
        model_config = AutoConfig.from_pretrained(base, local_files_only=True)
        config = GenerationConfig.from_model_config(model_config).to_diff_dict()
    tokenizer = read_manifest(Path(run.work) / PREPARED).tokenizer
    known = config.get("eos_token_id")
    ends = [*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id, *tokenizer.end_of_turn_token_ids]
    if ends := list(dict.fromkeys(token for token in ends if token is not None)):
        config["eos_token_id"] = ends
        config.setdefault("pad_token_id", ends[0])
    return config


def _write_companions(model: PreTrainedModel | PeftModel, run: RunConfig, folder: Path, dtype: torch.dtype) -> None:
    """Everything in the folder but weights and model card."""
    base = Path(run.model_path)
    folder.mkdir(parents=True)
    for name in _TOKENIZER_FILES:
        if (base / name).exists():
            shutil.copyfile(base / name, folder / name)
    if folder.name == "adapter":
        adapter = cast("PeftModel", model).peft_config[ADAPTER]
        before = adapter.base_model_name_or_path, adapter.inference_mode
        adapter.base_model_name_or_path, adapter.revision = base_model(run.spec.model.source)
        adapter.inference_mode = True
        adapter.save_pretrained(str(folder))
        adapter.base_model_name_or_path, adapter.inference_mode = before
        return
    config = AutoConfig.from_pretrained(base, local_files_only=True)
    config.dtype = dtype
    config.architectures = [type(inner_model(model)).__name__]
    config.save_pretrained(folder)
    write_json(folder / "generation_config.json", generation_config(run))


def _check(
    run: RunConfig, folder: Path, tokens: torch.Tensor, trained: torch.Tensor, bound: float, device: torch.device
) -> ExportCheck:
    """Loads `folder` as a user would and compares its logits; on one rank.

    Raises:
        ExportError: it does not load whole, or its logits differ by more than `bound`.
    """
    where = f"export/{folder.name}"
    try:
        loaded = load(folder, Path(run.model_path))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ExportError(
            f"the weights that were written do not load: {str(error).splitlines()[0]}",
            where=where,
            hint="the checkpoint is kept: free disk space if it ran out and run the same command again",
        ) from error
    # A second copy of the model fits beside the trained one, or the CPU computes it.
    size = sum(p.numel() * p.element_size() for p in loaded.parameters())
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 1.5 * size:
        device = torch.device("cpu")
    written = logits(loaded.to(device), tokens, device)
    difference = float((written - trained).abs().max() / trained.abs().max().clamp_min(1e-9))
    agreement = float((written.argmax(-1) == trained.argmax(-1)).float().mean())
    if not difference <= bound:  # also when it is NaN
        raise ExportError(
            f"the weights that were written give other logits than the trained model: the largest difference is "
            f"{difference:.3g} of the largest logit, and may be {bound:.3g}; the likeliest token is the same at "
            f"{agreement:.0%} of {tokens.shape[1]} positions",
            where=where,
            hint="set output.dtype to fp32; if that does not help, please report it with the model's config.json",
        )
    return ExportCheck(
        folder=folder.name, tokens=tokens.shape[1], difference=difference, bound=bound, agreement=agreement
    )


def load(folder: Path, base: Path) -> Any:
    """The model in an exported folder, in the type on disk; an adapter is put on the model in `base`.

    Raises:
        ValueError: weights are missing from the folder.
    """
    disable_progress_bar()
    adapter = (folder / "adapter_config.json").exists()
    loader: Any = AutoModelForCausalLM
    model, info = loader.from_pretrained(
        base if adapter else folder, dtype="auto", local_files_only=True, output_loading_info=True
    )
    if info["missing_keys"]:  # transformers only warns and makes up random ones
        raise ValueError(f"{len(info['missing_keys'])} weights are missing, such as {min(info['missing_keys'])}")
    if not adapter:
        return model.eval()
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).eval()


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
