"""What the documents promise: links lead somewhere, make targets exist, the job file in the README is valid."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from finetune_api.files import check_file

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_links_lead_to_files_that_are_there() -> None:
    dead = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in PAGES
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
        if "://" not in link and not (page.parent / link).exists()
    ]
    assert dead == []


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"(?:^ {4}|`)make ([a-z0-9-]+)", text, re.MULTILINE))
    assert named
    assert named <= targets


def test_the_readmes_job_file_is_valid(tmp_path: Path) -> None:
    blocks = re.findall(r"(?:^(?: {4}.*)?\n)+", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    [job] = [block for block in blocks if "kind: FinetuneJob" in block]
    file = tmp_path / "job.yaml"
    file.write_text(textwrap.dedent(job), encoding="utf-8")
    assert [str(error) for error in check_file(str(file)).errors()] == []
