"""``python -m benchmarks.micro``: the report as JSON; on stderr, in a line, what became of the primitives."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from .. import machine
from . import __doc__ as description
from . import cases, ceilings, primitives


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.micro", description=" ".join((description or "").split())
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {
        "machine": {**machine.hardware(), "threads": options.threads, "slug": machine.slug()},
        "versions": machine.versions(),
    }
    try:
        for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
            report[device] = ceilings.report(device)
        report["predicted_for"] = cases.PREDICTED_FOR
        if why := primitives.why_not():
            report["primitives"] = said = f"not measured: {why}"
        else:
            rows = report["primitives"] = []
            for row in primitives.rows():
                rows.append(row)
            said = primitives.summary(rows)
    finally:  # what there is, if time runs out
        text = json.dumps(report, indent=2)
        print(text)
        if options.json:
            with open(options.json, "w") as file:
                file.write(text + "\n")
    print(said, file=sys.stderr)


if __name__ == "__main__":
    main()
