"""Weights on disk are the trained model's: whatever the ZeRO stage, merged or not, in shards or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.errors import ExportError
from finetune_api.run import RunConfig
from finetune_trainer import export as export_module
from finetune_trainer import weights
from finetune_trainer.distributed import World
from finetune_trainer.export import export
from finetune_trainer.manifest import Manifest, SourceFacts, Splits, TokenizerFacts, write_manifest
from finetune_trainer.model import load_model
from finetune_trainer.model_card import public
from finetune_trainer.prepare.shards import ShardWriter
from tests.tiny import END, SPECIAL, tiny_llama
from tests.trainer.workers import in_workers


class OneProcess(World):
    """A world of one worker, without a process group."""

    def from_first(self, value: Any) -> Any:
        return value


WORLD = OneProcess(rank=0, size=1, device=torch.device("cpu"))
END_ID = SPECIAL.index(END)


def prepared_run(folder: Path, model: Path, tuning: str = "lora", **output: object) -> RunConfig:
    """A run whose rows are prepared: one sequence of 40 random tokens."""
    prepared = folder / "prepared"
    prepared.mkdir(parents=True)
    ids = np.random.default_rng(0).integers(0, 500, 40).astype(np.int32)
    splits = {}
    for split in ("train", "evaluation"):
        writer = ShardWriter(prepared, split)
        writer.add(ids, np.ones(40, np.float16), np.array([40], np.int32))
        splits[split] = writer.close()
    write_manifest(
        prepared,
        Manifest(
            key="0" * 64,
            sequence_length=64,
            packing=True,
            tokenizer=TokenizerFacts(
                vocabulary_size=512,
                eos_token_id=END_ID,
                end_of_turn_token_ids=[END_ID, 7],
                chat_template_sha256=None,
                sha256="0" * 64,
            ),
            sources=[SourceFacts(uri="rows.jsonl", format="chat", rows=1, bytes=1, sha256="0" * 64)],
            splits=Splits(**splits),
        ),
    )
    spec = {
        "model": {"source": "hf://tiny/llama@abc123"},
        "method": {"tuning": tuning, "lora": {"rank": 4}},
        "data": {"train": [{"uri": "rows.jsonl"}]},
        "training": {"precision": "fp32"},
        "output": {"uri": "out", **output},
    }
    return RunConfig.model_validate(
        {"name": "tiny", "uid": "u", "spec": spec, "baseDir": str(folder), "modelPath": str(model), "work": str(folder)}
    )


def trained(run: RunConfig) -> Any:
    """The run's model with every weight that is trained moved a little, as training would."""
    torch.manual_seed(run.spec.training.seed)
    model = load_model(run.model_path, run.spec, {"zero_optimization": {"stage": 0}})
    shake(model)
    return model


def shake(model: torch.nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base") / "model")


def test_a_fully_tuned_model_has_the_files_and_names_that_save_pretrained_writes(base: Path, tmp_path: Path) -> None:
    run = prepared_run(tmp_path, base, "full")
    model = trained(run)
    export(model, run, tmp_path / "export", WORLD)
    model.save_pretrained(tmp_path / "expected")
    expected, written = (load_file(tmp_path / d / "model.safetensors") for d in ("expected", "export/model"))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    config = json.loads((tmp_path / "export/model/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"


def test_the_tokens_that_end_a_turn_end_generation(base: Path, tmp_path: Path) -> None:
    run = prepared_run(tmp_path, base, "full")
    export(trained(run), run, tmp_path / "export", WORLD)
    generation = json.loads((tmp_path / "export/model/generation_config.json").read_text())
    assert generation["eos_token_id"] == [END_ID, 7]


def test_what_the_base_model_says_about_generation_is_kept(base: Path, tmp_path: Path) -> None:
    model = shutil.copytree(base, tmp_path / "base")
    # transformers reads this, but refuses to write it: it does nothing without do_sample.
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": 9}))
    run = prepared_run(tmp_path, model, "full")
    export(trained(run), run, tmp_path / "export", WORLD)
    generation = json.loads((tmp_path / "export/model/generation_config.json").read_text())
    assert generation == {"temperature": 0.6, "eos_token_id": [9, END_ID, 7], "pad_token_id": 9}


def test_the_tokenizer_and_its_chat_template_come_along_unchanged(base: Path, tmp_path: Path) -> None:
    run = prepared_run(tmp_path, base)
    export(trained(run), run, tmp_path / "export", WORLD)
    turn = [{"role": "user", "content": "What's your first name?"}]
    for folder in ("adapter", "merged"):
        written = AutoTokenizer.from_pretrained(tmp_path / "export" / folder)
        assert written.apply_chat_template(turn) == AutoTokenizer.from_pretrained(base).apply_chat_template(turn)


def test_the_merged_model_is_what_peft_merges(base: Path, tmp_path: Path) -> None:
    run = prepared_run(tmp_path, base)
    model = trained(run)
    export(model, run, tmp_path / "export", WORLD)
    written = load_file(tmp_path / "export/merged/model.safetensors")
    expected = model.merge_and_unload().state_dict()
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(written[name], tensor)


def test_the_adapter_loads_onto_the_base_model_and_names_it(base: Path, tmp_path: Path) -> None:
    run = prepared_run(tmp_path, base)
    model = trained(run)
    export(model, run, tmp_path / "export", WORLD)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "export/adapter"))
    written, expected = get_peft_model_state_dict(loaded), get_peft_model_state_dict(model)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    config = json.loads((tmp_path / "export/adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("tiny/llama", "abc123")


def test_without_merge_only_the_adapter_is_written(base: Path, tmp_path: Path) -> None:
    run = prepared_run(tmp_path, base, merge=False)
    export(trained(run), run, tmp_path / "export", WORLD)
    assert {p.name for p in (tmp_path / "export").iterdir()} == {"adapter", "export.json"}


def test_large_models_become_shards_with_an_index(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SHARD_BYTES", 100_000)
    run = prepared_run(tmp_path, base, "full")
    model = trained(run)
    export(model, run, tmp_path / "export", WORLD)
    folder = tmp_path / "export/model"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(path.name.endswith(f"-of-{len(shards):05}.safetensors") for path in shards)
    written = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    assert written.keys() == index["weight_map"].keys() == model.state_dict().keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in model.state_dict().values())


def test_tied_weights_are_written_once(base: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(base, tie_word_embeddings=True)
    tied = tmp_path / "tied"
    LlamaForCausalLM(config).save_pretrained(tied)
    run = prepared_run(tmp_path / "run", tied, "full")
    export(trained(run), run, tmp_path / "export", WORLD)
    assert "lm_head.weight" not in load_file(tmp_path / "export/model/model.safetensors")


def test_the_type_on_disk_is_the_one_asked_for(base: Path, tmp_path: Path) -> None:
    run = prepared_run(tmp_path, base, dtype="bf16")
    export(trained(run), run, tmp_path / "export", WORLD)
    assert {t.dtype for t in load_file(tmp_path / "export/merged/model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "export/merged/config.json").read_text())["dtype"] == "bfloat16"
    check = json.loads((tmp_path / "export/export.json").read_text())["checks"][1]
    assert 1e-4 < check["difference"] <= check["bound"] == export_module.BOUNDS[torch.bfloat16]


def test_an_expert_mixture_is_written_in_its_checkpoints_own_names(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    run = prepared_run(tmp_path / "run", tmp_path / "base", "full")
    model = trained(run)
    export(model, run, tmp_path / "export", WORLD)
    model.save_pretrained(tmp_path / "expected")
    expected, written = (load_file(tmp_path / d / "model.safetensors") for d in ("expected", "export/model"))
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in written
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_weights_that_differ_from_the_trained_model_are_an_error(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared_run(tmp_path, base)
    model = trained(run)
    value = weights.Weight.value

    def without_delta(weight: weights.Weight, parts: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return value(weights.Weight(weight.name, weight.tensor), parts, dtype)

    monkeypatch.setattr(weights.Weight, "value", without_delta)
    with pytest.raises(ExportError, match=r"export/merged: .* other logits .* largest difference is [\d.]+"):
        export(model, run, tmp_path / "export", WORLD)
    assert not (tmp_path / "export/export.json").exists()


def test_no_folder_of_this_machine_is_told_to_others() -> None:
    assert public("/home/someone/models/llama") == "llama"
    assert public("file:///home/someone/models/llama") == "llama"
    assert public("../model") == "../model"
    assert public("s3://bucket/models/llama") == "s3://bucket/models/llama"


CASES = [(stage, tuning) for stage in (0, 2, 3) for tuning in ("full", "lora")]


def _export_all(rank: int, folder: Path) -> None:
    """Exports the same weights from each ZeRO stage, then again where only rank 0 meets an obstacle."""
    import deepspeed

    from finetune_trainer.distributed import join_world
    from finetune_trainer.engine import build_engine

    world = join_world()
    for stage, tuning in CASES:
        target = folder / f"zero{stage}-{tuning}"
        run = RunConfig.model_validate_json((target / "run.json").read_text())
        engine = build_engine(run.model_path, run.spec, world, 1)
        parameters = list(engine.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=stage == 3):
            if rank == 0 or stage != 3:
                shake(engine.module)
        export(engine.module.model, run, target / "export", world)
        if rank == 0:
            (target / "blocked").write_text("a file where a folder should be")
        try:
            export(engine.module.model, run, target / "blocked" / "export", world)
        except OSError:
            (target / f"failed-{rank}").touch()
        engine.destroy()


@pytest.fixture(scope="module")
def two_workers(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    for stage, tuning in CASES:
        run = prepared_run(folder / f"zero{stage}-{tuning}", base, tuning)
        # Without this, tensors as small as these would not be partitioned.
        zero = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
        spec = run.spec.model_dump(mode="json") | {"deepspeed": {"zeroStage": stage, "config": zero}}
        document = run.model_dump(mode="json") | {"spec": spec}
        (folder / f"zero{stage}-{tuning}" / "run.json").write_text(json.dumps(document))
    in_workers(_export_all, 2, folder / "store", folder)
    return folder


@pytest.mark.parametrize(("stage", "tuning"), CASES)
def test_every_zero_stage_writes_the_same_weights(
    stage: int, tuning: str, two_workers: Path, base: Path, tmp_path: Path
) -> None:
    run = prepared_run(tmp_path, base, tuning)
    export(trained(run), run, tmp_path / "export", WORLD)
    for path in (tmp_path / "export").glob("*/*.safetensors"):
        expected = load_file(path)
        written = load_file(two_workers / f"zero{stage}-{tuning}" / path.relative_to(tmp_path))
        assert written.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(written[name], tensor, msg=f"{path.parent.name}: {name}")


@pytest.mark.parametrize(("stage", "tuning"), CASES)
def test_a_failure_of_rank_0_ends_every_rank(stage: int, tuning: str, two_workers: Path) -> None:
    folder = two_workers / f"zero{stage}-{tuning}"
    assert {p.name for p in folder.glob("failed-*")} == {"failed-0", "failed-1"}
