"""The loss of pairs, against one pass over each document alone, and its reference, against a model of its own."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from finetune_api.job import Dpo, Lora
from finetune_trainer import attention
from finetune_trainer.batches import MicroBatch, collate
from finetune_trainer.dataset import PackedSequence
from finetune_trainer.model import add_adapters
from finetune_trainer.preference import PreferenceLoss
from tests.trainer.test_train_loss import small

LOSSES = ("sigmoid", "ipo", "length-normalised")
LENGTHS = ((9, 4, 12, 17), (5, 8))


def pairs(seed: int = 0) -> list[PackedSequence]:
    """Two sequences with three pairs of random documents, of which about half is learned."""
    random, found = np.random.default_rng(seed), []
    for lengths in LENGTHS:
        weights = random.choice([0, 1], sum(lengths)).astype(np.float32)
        starts = np.cumsum([0, *lengths[:-1]])
        weights[starts], weights[starts + 1] = 0, 1
        ids = random.integers(1, 128, sum(lengths), np.int32)
        references = -random.uniform(5, 50, len(lengths)).astype(np.float32)
        found.append(PackedSequence(ids, weights, np.array(lengths, np.int32), references))
    return found


def packed_model(**changes: Any) -> Any:
    model = small("llama", **changes)
    attention.register()
    model.set_attn_implementation(attention.NAME)
    return model


def log_probabilities(model: Any, sequences: list[PackedSequence]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each document Σ log p of what is learned, and its tokens, from a pass over it alone."""
    plain = copy.copy(model)
    found, counts = [], []
    for sequence in sequences:
        lengths = sequence.documents.tolist()
        parts = zip(
            torch.from_numpy(sequence.input_ids).long().split(lengths),
            torch.from_numpy(sequence.weights).split(lengths),
            strict=True,
        )
        for ids, weights in parts:
            plain.set_attn_implementation("sdpa")
            logits = plain(ids[None]).logits[0, :-1]
            found.append(-(F.cross_entropy(logits, ids[1:], reduction="none") * weights[1:]).sum())
            counts.append(weights.sum())
            plain.set_attn_implementation(attention.NAME)
    return torch.stack(found), torch.stack(counts)


def expected(dpo: Dpo, model: Any, sequences: list[PackedSequence]) -> torch.Tensor:
    """The loss and the figures by their formulas."""
    logps, tokens = log_probabilities(model, sequences)
    ratios = logps - torch.from_numpy(np.concatenate([s.references for s in sequences]))
    chosen, rejected = ratios[0::2], ratios[1::2]
    if dpo.loss == "sigmoid":
        loss = -torch.log(1 / (1 + torch.exp(-dpo.beta * (chosen - rejected))))
    else:
        delta = chosen / tokens[0::2] - rejected / tokens[1::2]
        loss = (delta - 1 / (2 * dpo.beta)) ** 2 if dpo.loss == "ipo" else -torch.log(torch.sigmoid(dpo.beta * delta))
    margin = dpo.beta * (chosen - rejected)
    means = logps / tokens
    return torch.stack([loss.sum(), margin.sum(), (margin > 0).sum(), (means[0::2] > means[1::2]).sum()])


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradient_are_those_of_each_document_alone(kind: Any, fused: bool, tied: bool) -> None:
    dpo = Dpo(beta=0.3, loss=kind)
    model, sequences = packed_model(tie_word_embeddings=tied), pairs()
    wanted = expected(dpo, model, sequences)
    wanted[0].backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()

    module = PreferenceLoss(model, dpo)
    module.fused = fused
    found = module(collate(sequences))
    found[0].backward()

    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    largest = max(float(g.abs().max()) for g in gradients.values() if g is not None)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("fused", [True, False])
def test_the_reference_is_the_model_without_its_adapters(fused: bool) -> None:
    base = packed_model()
    wanted = log_probabilities(base, pairs())[0].detach()
    tuned = add_adapters(copy.deepcopy(base), Lora(rank=4, dropout=0.5))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=10)
    trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
    module = PreferenceLoss(tuned, Dpo()).eval()
    module.fused = fused
    batch = collate(pairs())
    with torch.no_grad():
        found, own = module(batch, reference=True), module(batch)

    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    assert {name for name, p in tuned.named_parameters() if p.requires_grad} == trained
    same = PreferenceLoss(base, Dpo())(batch).detach()
    assert abs(float(own[1] - same[1])) > 0.1, "the adapters count again"


def test_a_model_that_is_its_own_reference_prefers_nothing() -> None:
    module = PreferenceLoss(packed_model(), Dpo())
    batch = collate(pairs())
    with torch.no_grad():
        references = module(batch, reference=True)
        loss, margin, accurate, _ = module(MicroBatch(**(vars(batch) | {"references": references}))).tolist()
    assert loss == pytest.approx(3 * math.log(2))
    assert (margin, accurate) == (0, 0)


def test_a_worker_without_pairs_adds_nothing() -> None:
    model = packed_model()
    found = PreferenceLoss(model, Dpo())(collate([]))
    found[0].backward()
    assert found.tolist() == [0, 0, 0, 0]
    assert not any(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
