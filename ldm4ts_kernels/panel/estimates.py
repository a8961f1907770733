"""Estimates and recommendations for the panel: asked of a child process, kept on disk.

The first question about a model is traced, which takes seconds and holds Python's lock, so that it
runs in a process of its own. An answer holds all batch sizes and is kept until the package changes.
"""

import asyncio
import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from ldm4ts_kernels.caches import code_version, user_cache
from ldm4ts_kernels.panel.worker import Worker

Answer = dict[str, Any]


class Question(NamedTuple):
    """A function of `panel.questions` and its arguments, hashable."""

    function: str
    arguments: tuple[tuple[str, Any], ...]


def about_estimate(**arguments: Any) -> Question:
    """Ask for `estimate_vram_usage` at every batch size; arguments are its own but batch_size."""
    return Question("estimate", tuple(sorted(arguments.items())))


def about_card(**arguments: Any) -> Question:
    """Ask for `recommend`; arguments are its own."""
    return Question("recommend", tuple(sorted(arguments.items())))


class Estimates:
    """Answers questions: at once where the answer is known, else when it has been computed."""

    def __init__(self, cache: Path | None = None) -> None:
        self.cache = cache or user_cache("estimates")
        self.worker = Worker()
        self.known: dict[Question, Answer] = {}
        self.asked: dict[Question, asyncio.Task[Answer]] = {}

    def look_up(self, question: Question) -> Answer | None:
        """Return an answer that is known or on disk, else None."""
        if question not in self.known:
            try:
                self.known[question] = json.loads(self._file(question).read_text())
            except (OSError, ValueError):  # not asked yet, or a file that was cut short
                return None
        return self.known[question]

    async def ask(self, question: Question) -> Answer:
        """Return the answer, computed if need be. Raises WorkerError."""
        found = self.look_up(question)
        if found is not None:
            return found
        if question not in self.asked:
            task = asyncio.create_task(self._compute(question))
            task.add_done_callback(lambda _: self.asked.pop(question))
            self.asked[question] = task
        return await asyncio.shield(self.asked[question])

    def close(self) -> None:
        """End the child process."""
        self.worker.close()

    async def _compute(self, question: Question) -> Answer:
        found = await self.worker.ask(question.function, dict(question.arguments))
        self.known[question] = found
        file = self._file(question)
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(found))
        unfinished.replace(file)
        return self.known[question]

    def _file(self, question: Question) -> Path:
        name = hashlib.sha256(json.dumps(question).encode()).hexdigest()[:24]
        return self.cache / code_version() / f"{name}.json"
