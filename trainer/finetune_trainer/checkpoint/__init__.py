"""Checkpoints to resume from: each worker's own shard, in the background, a marker last (design/checkpoints.md)."""

from finetune_trainer.checkpoint.store import CheckpointStore

__all__ = ["CheckpointStore"]
