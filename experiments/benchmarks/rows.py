"""The result file: written whole after every run, so that a benchmark that is killed keeps what it has.

`runs` of a cell are kept as they were measured; the figures beside them are their medians. A file of another
configuration (device, versions, sources, number of steps, seed) is moved to `superseded/` and never used.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from experiments.benchmarks.contenders import CONTENDERS
from experiments.benchmarks.decode import DECODE, PREFILL, TOLERANCE, Cell, Timing
from experiments.environment import environment, sources_hash, what_matters
from experiments.measuring import Machine
from experiments.progress import table
from experiments.storage import hash_of, now, read_json, set_aside, write_json

SCHEMA_VERSION = 1
BENCHMARK = "decode"
FIGURE = {DECODE: "tpot_ms", PREFILL: "prefill_ms"}


class ResultFile:
    """Finished runs by cell, on the disk and in memory. `path` None: in memory alone."""

    def __init__(self, path: Path | None, machine: Machine, timing: Timing, command: str):
        self.path = path
        matters = what_matters(machine.device)
        self.head = {
            "schema_version": SCHEMA_VERSION,
            "benchmark": BENCHMARK,
            "device": matters["device"],
            "dtype": machine.dtype_name,
            "steps": timing.steps,
            "warmup_steps": timing.warmup,
            "max_run_sec": timing.max_sec,
            "check_tolerance": TOLERANCE[machine.dtype_name],
            "check": "root mean square of the logits' difference to those of the eager decoder with math, as a share "
            "of the logits' own; prompt and first steps",
            "floor": "bytes of weights (without the table of input embeddings) and of the keys and values attended "
            "to, over the bytes that a copy reads and writes per second in the same run",
        }
        own = sources_hash("experiments/benchmarks/*.py")
        config = {**self.head, "seed": timing.seed, "benchmark_sources": own, **matters}
        self.config_hash = hash_of(config)
        self.environment = environment(machine.device, command, timing.seed)
        self.models: dict[str, dict] = {}
        self._runs: dict[Cell, list[dict]] = {}
        self._failed: dict[Cell, tuple[str, str]] = {}

    # --- reading ---------------------------------------------------------------------------------------------

    def resume(self) -> str:
        """Take over what an earlier run of the same configuration finished; says what became of the file."""
        if self.path is None or not self.path.exists():
            return ""
        try:
            value = read_json(self.path)
            known = value.get("benchmark") == BENCHMARK and value.get("config_hash") == self.config_hash
        except ValueError:
            known = False
        if not known:
            aside = set_aside(self.path, "earlier")
            return f"{self.path} holds results of another configuration, kept as {aside}"
        for row in value["rows"]:
            cell = Cell(**row["cell"])
            self._runs[cell] = list(row["runs"])
        self.models = value["models"]
        return f"goes on with {sum(map(len, self._runs.values()))} finished runs in {self.path}"

    def has(self, cell: Cell, repeat: int) -> bool:
        """Whether that run is finished, or the cell has failed in this process."""
        return cell in self._failed or len(self._runs.get(cell, ())) > repeat

    # --- writing ---------------------------------------------------------------------------------------------

    def add(self, cell: Cell, run: dict) -> None:
        """Keep a finished run."""
        self._runs.setdefault(cell, []).append(run)
        self.save(complete=False)

    def fail(self, cell: Cell, status: str, reason: str) -> None:
        """Note why a cell has no (more) runs: `status` "skipped" (it cannot run here) or "failed"."""
        self._failed[cell] = (status, reason)
        self._runs.setdefault(cell, [])
        self.save(complete=False)

    def save(self, complete: bool) -> None:
        """Write the file, whole."""
        if self.path is not None:
            write_json(self.path, self.contents(complete))

    @property
    def failures(self) -> list[str]:
        """What failed, with the reason; what cannot run here is none."""
        return [f"{cell}: {reason}" for cell, (status, reason) in self._failed.items() if status == "failed"]

    def contents(self, complete: bool) -> dict:
        """The file's contents."""
        return {
            **self.head,
            "config_hash": self.config_hash,
            "complete": complete,
            "models": self.models,
            "rows": self.rows(),
            "environment": self.environment,
            "timestamp": now(),
        }

    def rows(self) -> list[dict]:
        """A row for each cell: medians, comparisons, raw runs."""
        rows = {cell: self._row(cell, runs) for cell, runs in self._runs.items()}
        for cell, row in rows.items():
            if cell.kind == DECODE and row["status"] == "ok":
                row |= self._speedup(cell, row, rows)
        return list(rows.values())

    def table(self) -> str:
        """What a person reads at the end: the decode steps, in the order of the file."""
        rows = []
        for row in self.rows():
            if row["cell"]["kind"] == DECODE and row["status"] == "ok":
                speedup = "-" if row["speedup"] is None else f"{row['speedup']:.2f}x"
                figures = [f"{row['tpot_ms']:.3f}", f"{row['ratio_to_floor']:.2f}", speedup]
                rows.append([*figures, str(Cell(**row["cell"]))])
        return table(["ms/step", "x floor", "speedup", ""], rows) if rows else "nothing was measured"

    def _row(self, cell: Cell, runs: Sequence[dict]) -> dict:
        contender = CONTENDERS[cell.contender]
        group = contender.group or contender.method
        row = {"cell": cell.key, "label": contender.label, "group": group, "status": "ok"}
        row["interleaved"] = not contender.at_once
        if cell in self._failed:
            row["status"], row["reason"] = self._failed[cell]
        if not runs:
            return {**row, FIGURE[cell.kind]: None, "runs": []}
        figure = FIGURE[cell.kind]
        values = [run[figure] for run in runs]
        row |= {figure: statistics.median(values), "spread_ms": [min(values), max(values)]}
        facts = ("engine", "compile_sec", "kv_cache_mb", "peak_memory_mb", "peak_memory_kind", "check")
        row |= {name: runs[0][name] for name in facts if name in runs[0]}
        row["toks_per_sec"] = 1e3 * cell.batch_size * (1 if cell.kind == DECODE else cell.length) / row[figure]
        if cell.kind == DECODE:
            row["floor_ms"] = statistics.median(1e3 * run["step_nbytes"] / run["copy_bytes_per_sec"] for run in runs)
            row["ratio_to_floor"] = row[figure] / row["floor_ms"]
        return row | {"runs": list(runs)}

    def _speedup(self, cell: Cell, row: dict, rows: dict[Cell, dict]) -> dict:
        """Time of the re-computation with the same backend and engine over the contender's own."""
        partner = CONTENDERS[cell.contender].compared_with
        if not partner:
            return {"speedup": None, "speedup_reason": "no re-computation with this engine and backend"}
        base = rows.get(Cell(**{**cell.key, "contender": partner}))
        if base is None or base["status"] != "ok" or base["engine"] != row["engine"]:
            return {"speedup": None, "speedup_reason": f"{partner} was not measured with this engine and backend"}
        return {"speedup": base["tpot_ms"] / row["tpot_ms"]}
