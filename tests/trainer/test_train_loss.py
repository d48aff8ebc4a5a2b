"""The loss and its shortcuts, against transformers' own forward pass on each document alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from finetune_api.job import Lora
from finetune_trainer import attention
from finetune_trainer.batches import collate
from finetune_trainer.dataset import PackedSequence
from finetune_trainer.loss import LanguageModelLoss, _LinearCrossEntropy
from finetune_trainer.model import add_adapters, supports_packed_attention

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def small(kind: str, **changes: Any) -> Any:
    """A randomly initialised model of this architecture; large weights, so that logits differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SMALL | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    return model


def packed(lengths: tuple[int, ...], seed: int = 0) -> PackedSequence:
    """Random documents of these lengths with weights of 0, 0.5 and 1."""
    random = np.random.default_rng(seed)
    weights = random.choice([0, 0.5, 1], sum(lengths)).astype(np.float32)
    weights[np.cumsum([0, *lengths[:-1]])] = 0
    return PackedSequence(random.integers(1, 128, sum(lengths), np.int32), weights, np.array(lengths, np.int32))


def one_by_one(model: Any, sequences: list[PackedSequence]) -> torch.Tensor:
    """Σ weights · nll from the model's own forward pass over each document."""
    total = torch.zeros(())
    for sequence in sequences:
        lengths = sequence.documents.tolist()
        for ids, weights in zip(
            torch.from_numpy(sequence.input_ids).long().split(lengths),
            torch.from_numpy(sequence.weights).split(lengths),
            strict=True,
        ):
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            total = total + (F.cross_entropy(logits[:-1], ids[1:], reduction="none") * weights[1:]).sum()
    return total


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def use_packed_attention(model: Any) -> None:
    assert supports_packed_attention(model)
    attention.register()
    model.set_attn_implementation(attention.NAME)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("phi", {"num_key_value_heads": 4}),  # bias on the output layer
        ("mistral", {"sliding_window": 6}),  # narrower than the documents
        ("qwen3", {}),
    ],
    ids=str,
)
def test_a_packed_micro_batch_has_loss_and_gradient_of_its_documents(kind: str, changes: dict[str, Any]) -> None:
    sequences = [packed((9, 3, 17)), packed((2, 30), seed=1)]
    model = small(kind, **changes)
    alone = one_by_one(model, sequences)
    expected = gradients(model, alone)
    use_packed_attention(model)
    wrapped = LanguageModelLoss(model)
    assert wrapped.fused
    together = wrapped(collate(sequences))
    tokens = sum(float(s.weights.sum()) for s in sequences)
    assert together.item() / tokens == pytest.approx(alone.item() / tokens, abs=1e-5)
    found = gradients(model, together)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-3, rtol=1e-4, msg=name)


def test_documents_do_not_see_each_other() -> None:
    model = small("llama")
    use_packed_attention(model)
    second = packed((12,), seed=2)
    losses = [LanguageModelLoss(model)(collate([packed((8,), seed=seed), second])) for seed in (3, 4)]
    firsts = [LanguageModelLoss(model)(collate([packed((8,), seed=seed)])) for seed in (3, 4)]
    assert (losses[0] - firsts[0]).item() == pytest.approx((losses[1] - firsts[1]).item(), abs=1e-3)


def test_adapters_alone_get_gradients() -> None:
    model = add_adapters(small("llama"), Lora(target_modules=["q_proj", "down_proj"]))
    model.get_base_model().set_attn_implementation("sdpa")
    sequences = [packed((9, 3, 17))]
    expected = gradients(model, one_by_one(model, sequences))
    use_packed_attention(model.get_base_model())
    found = gradients(model, LanguageModelLoss(model)(collate(sequences)))
    assert found.keys() == expected.keys()
    assert all("lora_" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-3, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
        ("gemma2", {"final_logit_softcapping": 3.0}),
    ],
)
def test_a_model_that_changes_its_logits_afterwards_is_found_out(kind: str, changes: dict[str, Any]) -> None:
    wrapped = LanguageModelLoss(small(kind, **changes))
    batch = collate([packed((9, 3, 17))])
    assert wrapped(batch, logits_error=True) > 0.1
    wrapped.fused = False
    assert wrapped(batch).item() == pytest.approx(one_by_one(wrapped.model, [packed((9, 3, 17))]).item(), rel=1e-5)


def test_a_plain_model_has_no_logits_error() -> None:
    assert LanguageModelLoss(small("llama"))(collate([packed((9, 3))]), logits_error=True) < 1e-6


def test_softcapped_attention_is_left_to_the_model() -> None:
    assert not supports_packed_attention(small("gemma2"))


def test_chunks_add_up() -> None:
    rows, vocabulary, size = 20_000, 512, 4  # 2.4 chunks of 16 MiB of float32 logits
    torch.manual_seed(0)
    hidden = torch.randn(rows, size, requires_grad=True)
    matrix = torch.randn(vocabulary, size, requires_grad=True)
    bias = torch.randn(vocabulary, requires_grad=True)
    targets, weights = torch.randint(vocabulary, (rows,)), torch.rand(rows)
    expected = (F.cross_entropy(hidden @ matrix.T + bias, targets, reduction="none") * weights).sum()
    found = _LinearCrossEntropy.apply(hidden, matrix, bias, targets, weights, True)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    inputs = (hidden, matrix, bias)
    for ours, theirs in zip(
        torch.autograd.grad(found * 0.5, inputs), torch.autograd.grad(expected * 0.5, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def test_an_empty_micro_batch_has_loss_and_gradients_of_zero() -> None:
    model = small("llama")
    use_packed_attention(model)
    empty = PackedSequence(np.zeros(2, np.int32), np.zeros(2, np.float32), np.array([2], np.int32))
    loss = LanguageModelLoss(model)(collate([empty]))
    found = gradients(model, loss)
    assert loss.item() == 0
    assert found.keys() == dict(model.named_parameters()).keys()
    assert not any(gradient.any() for gradient in found.values())
