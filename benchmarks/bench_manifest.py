"""What opening a corpus costs: lists and tables, durations measured or remembered. Writes results/manifest.md.

    python benchmarks/bench_manifest.py [--rows 1000000] [--out benchmarks/results/manifest.md]

Two tables. The first opens the real speech sets beside the checkout as a training run does before its first step, from
a list that says no durations, with and without what an earlier run remembered, and from a table. The second opens a
made-up corpus of --rows rows (no audio) as a list of JSON lines, an Arrow file and a Parquet file. Each figure is of a
process of its own: CPU seconds after imports, and resident memory above what the imports take.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SETS = ("fsdd/base.train.list", "an4/train.list", "cmn-words/train.list")

_OPEN = """
import json, sys, time
from pathlib import Path
import numpy, soundfile, torch, pyarrow.compute, pyarrow.parquet
from thawline.data.manifest import read_manifest
from thawline.data.speech import SpeechSamples
from thawline.data.speech_frontend import SpeechFrontend

def memory(name):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(name))

before, began = memory("VmRSS"), time.process_time()
manifest = read_manifest(Path(sys.argv[1]))
if sys.argv[2] == "samples":
    samples = SpeechSamples(manifest, SpeechFrontend(), None, training=True)
    first, fingerprint = samples.length(0), samples.fingerprint
opened = time.process_time()
if sys.argv[2] == "rows":
    fingerprint = manifest.fingerprint
hashed = time.process_time()
print(json.dumps({"rows": len(manifest), "seconds": opened - began, "fingerprint_s": hashed - opened,
                  "memory_mb": memory("VmRSS") - before, "anonymous_mb": memory("RssAnon"),
                  "fingerprint": fingerprint}))
"""


def opened(path: Path, what: str, cache: Path) -> dict[str, Any]:
    """What a fresh interpreter finds."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _OPEN, str(path), what], check=True, capture_output=True, text=True, env=environment
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def real(path: Path, folder: Path) -> str:
    """One row of the first table."""
    from thawline.data.audio import duration_s
    from thawline.data.manifest import read_manifest
    from thawline.data.manifests.table_writing import write_table

    rows = list(read_manifest(path))
    silent = folder / f"{path.parent.name}.list"
    fields = [{"key": r.key, "wav": r.wav, "txt": r.txt} for r in rows]
    silent.write_text("".join(json.dumps(row) + "\n" for row in fields), encoding="utf-8")
    table = folder / f"{path.parent.name}.arrow"
    with table.open("wb") as file:
        write_table(read_manifest(silent), file, folder=folder, seconds=duration_s)
    cold = opened(silent, "samples", folder / "cache")
    warm = opened(silent, "samples", folder / "cache")
    of_table = opened(table, "samples", folder / "cache")
    assert cold["fingerprint"] == warm["fingerprint"] == of_table["fingerprint"]
    cells = " | ".join(f"{found['seconds'] * 1e3:.0f}" for found in (cold, warm, of_table))
    return f"| {path.parent.name} ({Path(rows[0].wav).suffix}) | {len(rows)} | {cells} |"


def made_up(rows: int, folder: Path) -> list[str]:
    """The second table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "audio").mkdir()
    (folder / "audio/0.flac").write_bytes(b"fLaC")
    schema = pa.schema([("key", pa.string()), ("wav", pa.string()), ("txt", pa.string()), ("duration", pa.float64())])
    paths = {name: folder / f"corpus.{name}" for name in ("list", "arrow", "parquet")}
    with (
        paths["list"].open("w") as listed,
        pa.ipc.new_file(str(paths["arrow"]), schema) as arrow,
        pq.ParquetWriter(str(paths["parquet"]), schema) as parquet,
    ):
        for begin in range(0, rows, 65536):
            numbers = range(begin, min(rows, begin + 65536))
            columns: list[list[Any]] = [
                [f"utt{i:08d}" for i in numbers],
                [f"audio/{i}.flac" for i in numbers],
                [f"the words of utterance number {i} of this corpus" for i in numbers],
                [1 + i % 100 / 10 for i in numbers],
            ]
            batch = pa.record_batch(columns, schema=schema)
            arrow.write_batch(batch)
            parquet.write_batch(batch)
            listed.writelines(json.dumps(row) + "\n" for row in batch.to_pylist())
    lines, fingerprints = [], set()
    for name, path in (
        ("JSON lines", paths["list"]),
        ("Arrow", paths["arrow"]),
        ("Parquet, first time", paths["parquet"]),
        ("Parquet, again", paths["parquet"]),
    ):
        found = opened(path, "rows", folder / "cache")
        fingerprints.add(found["fingerprint"])
        lines.append(
            f"| {name} | {path.stat().st_size / 1e6:.0f} | {found['seconds']:.2f} | {found['fingerprint_s']:.2f} "
            f"| {found['memory_mb']:.0f} |"
        )
        print(lines[-1], flush=True)
    assert len(fingerprints) == 1
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "manifest.md")
    settings = parser.parse_args()
    shared = Path(os.environ.get("THAWLINE_SHARED", ROOT.parent / "shared"))
    lines = [
        "# Opening a corpus",
        "",
        f"`python benchmarks/bench_manifest.py --rows {settings.rows}`",
        "",
        f"{date.today()}; {os.cpu_count()} cores ({platform.machine()}), {platform.system()};",
        f"Python {platform.python_version()}. Load average {os.getloadavg()[0]:.1f}.",
        "CPU time after imports, each figure of a process of its own.",
        "",
        "Before the first step of a training run whose batches are cut by frames, in milliseconds; files in the",
        "system's cache. On storage across a network each header costs a round trip besides.",
        "",
        "| data | utterances | list without durations | the same, remembered | table |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name in SETS:
            if (shared / "data" / name).is_file():
                lines.append(real(shared / "data" / name, Path(folder)))
                print(lines[-1], flush=True)
    lines += [
        "",
        f"{settings.rows:,} rows, no audio. Memory is what is resident above the imports, mapped pages included.",
        "",
        "| manifest | MB on disk | open and check, s | fingerprint, s | memory, MB |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        lines += made_up(settings.rows, Path(folder))
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
