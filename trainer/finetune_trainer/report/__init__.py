"""The report of a run: `report.html` for people, `report.md` for terminals and reviews, `report.json` for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from finetune_api.result import Result
from finetune_trainer.figures import Event
from finetune_trainer.manifest import write_json
from finetune_trainer.report.curves import curves
from finetune_trainer.report.page import html
from finetune_trainer.report.text import markdown, summary

__all__ = ["REPORT_FILES", "summary", "write_report"]

REPORT_FILES: Final = ("report.html", "report.md", "report.json")


def write_report(result: Result, events: Sequence[Event], folder: Path) -> None:
    """Writes the three files.

    report.json holds result.json's fields and `curves`: for each series `steps` and `values`, every step.
    """
    series = curves(events)
    (folder / "report.html").write_text(html(result, series), encoding="utf-8")
    (folder / "report.md").write_text(markdown(result), encoding="utf-8")
    write_json(folder / "report.json", {**result.model_dump(mode="json"), "curves": asdict(series)})
