"""`vlmamba reproduce`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..model.fields import Count, Interval, Size
from .options import DemoPreset, Positional

if TYPE_CHECKING:
    from ..train.reproduction.tables import PaperRow, PaperTable


@dataclass
class Reproduce:
    """Train and evaluate the rows of a paper's table; print the figures beside the paper's.

    Without TABLE it lists the tables and their rows. The same command resumes an interrupted run, row by row.

    Examples:
    $ vlmamba reproduce
    $ vlmamba reproduce ml-mamba-connector --dry-run
    $ vlmamba reproduce vl-mamba-scan --launcher "torchrun --nproc-per-node 8"
    $ vlmamba reproduce vl-mamba-connector --miniature
    """

    table: Positional[str | None] = None
    """Name of a table."""
    row: tuple[str, ...] = ()
    """Labels of rows; all by default."""
    output: Path | None = None
    """Folder of the run; runs/TABLE by default, runs/TABLE-miniature with --miniature."""
    dry_run: bool = False
    """Print data, memory and hours of each row, and train nothing."""
    devices: Count = 8
    """Devices that --dry-run plans for."""
    root: Path = Path("data")
    """Folder of the recipe's data."""
    launcher: str = ""
    """Command that starts the training on several devices, such as "torchrun --nproc-per-node 8"."""
    batch_size: Size = 8
    """Requests in a batch of the evaluation."""
    miniature: bool = False
    """The same rows as tiny models on easy-VQA, with bootstrap intervals; the options below are for it."""
    seeds: Annotated[int, Interval("[2, 1000]")] = 10
    """Seeds of each row. Ten of a table with three or four rows take about an hour on two cores."""
    preset: DemoPreset = "quick"
    """The demo's stages that the rows are trained by."""
    shorten: Annotated[float, Interval("(0, inf)")] = 1.0
    """Divisor of the preset's number of epochs."""
    questions: Count = 9673
    """Number of test questions."""
    processes: Count | None = None
    """Runs at the same time, one thread each; the number of PyTorch's threads by default."""
    device: str = "cpu"
    """cpu, cuda, or auto: a GPU where there is one."""

    def run(self) -> None:
        from ..train.reproduction.tables import TABLES, table_named

        if self.table is None:
            for name, table in TABLES.items():
                print(f"{name:<20} {table.title}: {', '.join(table.rows)}")
            return
        table = table_named(self.table)
        rows = table.selected(self.row)
        if self.miniature:
            self._run_miniature(table, rows)
            return
        from ..train.lock import only_run_in
        from ..train.reproduction import full

        if self.dry_run:
            print(full.describe(table, rows, self.devices))
            return
        folder = self.output or Path("runs") / self.table
        with only_run_in(folder):
            found = full.run_rows(table, rows, folder, self.root, shlex.split(self.launcher), self.batch_size)
            full.save(found, folder / "results.json")
        print(full.comparison(table, rows, found))

    def _run_miniature(self, table: PaperTable, rows: dict[str, PaperRow]) -> None:
        import torch

        from ..model.device import device_named
        from ..train.lock import only_run_in
        from ..train.recipes import DEMOS
        from ..train.reproduction.miniature import run_miniature

        recipe = DEMOS[self.preset].faster(self.shorten)
        folder = self.output or Path("runs") / f"{self.table}-miniature"
        device = str(device_named(self.device))
        # As for the demo: OMP_NUM_THREADS is the user's word for the cores that are ours.
        processes = self.processes or (torch.get_num_threads() if device == "cpu" else 1)
        with only_run_in(folder):
            run_miniature(table, rows, recipe, folder, range(self.seeds), self.questions, processes, device)
