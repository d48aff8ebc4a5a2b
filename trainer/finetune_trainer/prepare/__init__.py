"""Prepare: read, check, deduplicate, render, mask, tokenise, pack; ends bad data before a GPU is taken."""

from finetune_trainer.prepare.cluster.opening import Opener
from finetune_trainer.prepare.machine import Progress
from finetune_trainer.prepare.stage import prepare

__all__ = ["Opener", "Progress", "prepare"]
