"""What a machine runs out of is named with how much there is, whatever library meets it first."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
import torch

from finetune_api.errors import HostMemoryFull, SharedMemoryFull, StorageError
from finetune_trainer.faults import named


def test_a_full_disk_is_named_with_its_room(tmp_path: Path) -> None:
    words = r"the disk is full: [\d,]+ of [\d,]+ bytes are free"
    with pytest.raises(StorageError, match=words) as raised, named(tmp_path), Path("/dev/full").open("wb", 0) as file:
        file.write(b"x")  # the kernel's own error, which has no file name
    assert raised.value.where in (str(tmp_path), tempfile.gettempdir())


def test_a_full_disk_is_named_with_the_file_where_it_is_known(tmp_path: Path) -> None:
    file = str(tmp_path / "step-1" / "shard")
    with pytest.raises(StorageError) as raised, named(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file)
    assert raised.value.where == file


def test_full_shared_memory_is_told_apart_from_a_full_disk(tmp_path: Path) -> None:
    said = "Error while creating shared memory segment /dev/shm/nccl-x (size 5767520): No space left on device"
    with pytest.raises(SharedMemoryFull, match="/dev/shm is full"), named(tmp_path):
        raise RuntimeError(said)


def test_memory_that_torch_cannot_get_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostMemoryFull, match=r"this process used up to [\d,]+ bytes"), named(tmp_path):
        torch.empty(1 << 60)


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), named(tmp_path):
        (tmp_path / "missing").read_bytes()
    with pytest.raises(RuntimeError, match="shape"), named(tmp_path):
        raise RuntimeError("shape mismatch")
