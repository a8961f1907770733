"""A child process that computes for the page: one question a line of JSON, one answer a line."""

import asyncio
import json
import sys
from typing import Any

LONGEST_ANSWER = 2**28  # bytes
CHILD = "ldm4ts_kernels.panel.questions"


class WorkerError(RuntimeError):
    """The question could not be answered; the message is the function's own, or the child's end."""


class Worker:
    """Asks one child process, one question at a time; it is started when it is first asked."""

    def __init__(self) -> None:
        self.process: asyncio.subprocess.Process | None = None
        self.free = asyncio.Lock()

    async def ask(self, function: str, arguments: dict[str, Any]) -> Any:
        """Return the child's answer. Raises WorkerError with the error that it met."""
        async with self.free:
            process = await self._started()
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps([function, arguments]).encode() + b"\n")
            await process.stdin.drain()
            line = await process.stdout.readline()
        if not line:
            raise WorkerError(
                f"the process that computes ended ({await process.wait()}); ask again"
            )
        found = json.loads(line)
        if "error" in found:
            raise WorkerError(found["error"])
        return found["answer"]

    def close(self) -> None:
        """End the child process; the next question starts another."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
        self.process = None

    async def _started(self) -> asyncio.subprocess.Process:
        if self.process is None or self.process.returncode is not None:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                CHILD,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=LONGEST_ANSWER,
                start_new_session=True,  # Ctrl-C is the panel's; the child ends with its stdin
            )
        return self.process
