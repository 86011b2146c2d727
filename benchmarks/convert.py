"""Times conversion beside `cp -r` of the same directory, and watches its memory.

    python benchmarks/convert.py [--layers 8] [--workers 1] [--repeats 3] [--folder /tmp/convert_benchmark]

Llama-3-8B layer shapes and vocabulary, random bf16: 2.1 GB of embedding and head, 0.44 GB a layer. Each round
takes both ways, HF to native and native to HF. Each way is timed twice, in turn: `cp -r` of the source, and
conversion, in a process of its own. Before each, the source is dropped from the page cache and the disk has
come to rest; both end on the disk: `cp` is followed by `sync`, the writer syncs each file. Verification, which
is on by default and hashes and compares everything, is timed apart. Prints a table of medians, then one line
of JSON; removes what it made. A share of `cp` is the median over rounds of the two times beside each other.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from pathlib import Path

from llama_directory import make_directory, watch

VOCABULARY = 128256
CHILD = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from paralign.engine.checkpoint.convert import convert
source, destination, workers = sys.argv[1:]
report = convert(Path(source), Path(destination), workers=int(workers), progress=False)
print(json.dumps(asdict(report)))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Conversion beside cp -r.")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/convert_benchmark"))
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True)
    try:
        size = make_directory(folder / "hf", layers=arguments.layers, vocabulary=VOCABULARY, seed=0)
        rounds = [one_round(folder, arguments.workers, cp_first=i % 2 == 0) for i in range(arguments.repeats)]
    finally:
        shutil.rmtree(folder)
    print(f"{arguments.layers} layers, {size / 1e9:.2f} GB, {arguments.workers} workers; medians")
    medians = {}
    for way in rounds[0]:
        median = {key: statistics.median(r[way][key] for r in rounds) for key in rounds[0][way]}
        median["share"] = statistics.median(r[way]["cp"] / r[way]["write"] for r in rounds)
        medians[way] = median
        speed = {key: size / median[key] / 1e9 for key in ("cp", "write", "verify")}
        print(
            f"{way:<14}cp {speed['cp']:5.2f} GB/s   writing {speed['write']:5.2f} GB/s, {median['share']:4.0%} of cp"
            f"   verifying {speed['verify']:5.2f} GB/s   {median['peak'] / 1e9:5.2f} GB at most"
        )
    print(json.dumps({"layers": arguments.layers, "bytes": size, "medians": medians}))


def one_round(folder: Path, workers: int, *, cp_first: bool) -> dict[str, dict[str, float]]:
    """Seconds of `cp`, of writing and of verifying each way, and peak resident bytes."""
    found: dict[str, dict[str, float]] = {}
    for way, source, destination in (("HF -> native", "hf", "native"), ("native -> HF", "native", "back")):
        found[way] = {}
        for side in ("cp", "ours") if cp_first else ("ours", "cp"):
            settle(folder / source)
            if side == "cp":
                copy = f"cp -r {folder / source} {folder / 'copy'} && sync $(find {folder / 'copy'} -type f)"
                found[way]["cp"] = watch(["sh", "-c", copy]).seconds
                shutil.rmtree(folder / "copy")
            else:
                command = [sys.executable, "-c", CHILD, str(folder / source), str(folder / destination)]
                run = watch([*command, str(workers)])
                report = json.loads(run.output.splitlines()[-1])
                found[way] |= {
                    "write": report["write_seconds"],
                    "verify": report["verify_seconds"],
                    "peak": run.peak,
                }
    for name in ("native", "back"):
        shutil.rmtree(folder / name)
    return found


def settle(source: Path) -> None:
    """Waits for the disk and drops a directory from the page cache."""
    os.sync()
    for path in source.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
