"""What a running sweep shows: a line for each running trial in a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.text import Text


class Board:
    """Shows a sweep while it runs; a context manager.

    Args:
        title: the study's name.
        dashboard: address of Dask's dashboard.
    """

    def __init__(self, title: str, dashboard: str) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.live = Live(console=self.console, refresh_per_second=4, transient=True)
        self.title, self.dashboard, self.summary = title, dashboard, ""

    def __enter__(self) -> Board:
        self.say(f"{self.title}: Dask's dashboard is at {self.dashboard}")
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()
        if self.summary:
            self.say(f"{self.title}: {self.summary}")

    def show(self, lines: Sequence[str], summary: str) -> None:
        """Replace what is shown, in a terminal."""
        self.summary = summary
        if self.console.is_terminal:
            text = "\n".join([*lines, f"{self.title}: {summary}"])
            self.live.update(Text(text, no_wrap=True, overflow="ellipsis"))

    def say(self, line: str, *, plain: bool = False) -> None:
        """Print a line that stays; if `plain`, only in a log, where nothing is replaced."""
        if plain and self.console.is_terminal:
            return
        stamp = time.strftime("%H:%M:%S")
        self.console.print(Text(f"{stamp}  {line}"))
        self.console.file.flush()
