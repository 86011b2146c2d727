"""Times conversion beside `cp -r` of the same directory, and watches its memory. Owns the comparison.

    python benchmarks/convert.py [--layers 8] [--workers 1] [--repeats 3] [--folder /tmp/convert_benchmark]

Llama-3-8B layer shapes and vocabulary, random bf16: 2.1 GB of embedding and head, 0.44 GB a layer. Each round
copies the directory, converts it to native and back, each in a process of its own. Both ways end on the disk:
`cp` is followed by `sync`, the writer syncs each file. Verification, which is on by default and hashes and
compares everything, is timed apart. Prints a table of medians, then one line of JSON; removes what it made.
"""

from __future__ import annotations

import argparse
import json
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
from paralign.engine.convert import convert
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
        rounds = [one_round(folder, size, arguments.workers) for _ in range(arguments.repeats)]
    finally:
        shutil.rmtree(folder)
    names = list(rounds[0])
    medians = {name: [statistics.median(r[name][i] for r in rounds) for i in range(2)] for name in names}
    print(f"{arguments.layers} layers, {size / 1e9:.2f} GB, {arguments.workers} workers; medians")
    for name, (speed, peak) in medians.items():
        share = speed / medians["cp -r"][0]
        memory = f"{peak / 1e9:8.2f} GB at most" if peak else ""
        print(f"{name:<22}{speed:8.2f} GB/s{share:8.0%} of cp{memory}")
    print(json.dumps({"layers": arguments.layers, "bytes": size, "medians": medians}))


def one_round(folder: Path, size: int, workers: int) -> dict[str, tuple[float, float]]:
    """GB/s and peak resident bytes of each way."""
    copy = f"cp -r {folder / 'hf'} {folder / 'copy'} && sync {folder / 'copy'}/*"
    copied = watch(["sh", "-c", copy])
    shutil.rmtree(folder / "copy")
    found = {"cp -r": (size / copied.seconds / 1e9, 0.0)}
    for name, source, destination in (("HF -> native", "hf", "native"), ("native -> HF", "native", "back")):
        run = watch(
            [sys.executable, "-c", CHILD, str(folder / source), str(folder / destination), str(workers)]
        )
        report = json.loads(run.output.splitlines()[-1])
        found[name] = (size / report["write_seconds"] / 1e9, float(run.peak))
        found[f"{name}, verifying"] = (size / report["verify_seconds"] / 1e9, 0.0)
    shutil.rmtree(folder / "native")
    shutil.rmtree(folder / "back")
    return found


if __name__ == "__main__":
    main()
