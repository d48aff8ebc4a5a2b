"""Prepare: read, check, deduplicate, render, mask, tokenise, pack; ends bad data before a GPU is taken."""

from finetune_trainer.prepare.stage import Progress, prepare

__all__ = ["Progress", "prepare"]
