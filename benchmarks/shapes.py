"""``shapes.yaml``, resolved for a device."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("shapes.yaml")


@functools.cache
def _file() -> dict[str, dict[str, dict[str, Any]]]:
    return yaml.safe_load(FILE.read_text())


def load(op: str, device: str, tiny: bool = False) -> dict[str, dict[str, Any]]:
    """Rows of ``op`` by name.

    Args:
        device: ``"cuda"``: the sizes as written; ``"cpu"``: with each row's ``cpu`` part over them.
        tiny: of the smoke test: a few channels, frames and pixels, the same geometry.
    """
    found = {}
    for name, row in _file()[op].items():
        if row.get("only", device) != device and not tiny:
            continue
        shape = {k: v for k, v in row.items() if k not in ("cpu", "only")}
        if device == "cpu":
            shape.update(row.get("cpu", {}))
        found[name] = _tiny(shape) if tiny else shape
    return found


def _tiny(shape: dict[str, Any]) -> dict[str, Any]:
    """Depthwise stays depthwise and a residual keeps fitting: channels shrink alike."""
    small = dict(shape)
    small["batch"] = min(shape["batch"], 2)
    if "window" in shape and "size" in shape:
        limits = [
            w * d + 2
            for w, d in zip(shape["window"], shape.get("dilation", (1, 1, 1)), strict=True)
        ]
        small["size"] = [min(n, m, 8) for n, m in zip(shape["size"], limits, strict=True)]
        small.update(window=[min(w, 3) for w in shape["window"]], heads=2, head_dim=8)
        if "stride" in shape:
            small["stride"] = [min(s, 2) for s in shape["stride"]]
    elif "window" in shape:
        small.update(_tiny_windows(shape))
    elif "input" in shape and isinstance(shape["input"], list):
        channels, *sizes = shape["input"]
        limits = [max(3, k) for k in shape.get("kernel", [4, 16, 16])]
        small["input"] = [
            min(channels, 4),
            *(min(s, n) for s, n in zip(sizes, limits, strict=True)),
        ]
        if "channels" in shape:
            same = shape["channels"] == channels
            small["channels"] = small["input"][0] if same else min(shape["channels"], 6)
        if shape.get("groups", 1) > 1:
            small["groups"] = small["input"][0]
        if not {"kernel", "levels"} & shape.keys():  # a model's clip
            small["input"][0] = channels
    elif "time" in shape:
        small.update(time=min(shape["time"], 5), input=6, hidden=8)
        small.update({k: min(shape[k], 2) for k in ("shortest", "projection") if k in shape})
    return small


def _tiny_windows(shape: dict[str, Any]) -> dict[str, Any]:
    """Pads, clipped axes and shifts stay what they are."""
    window = [min(w, 3) for w in shape["window"]]
    size = [
        w - 1 if n < full else w * min(-(-n // full), 2) - (n % full > 0)
        for n, full, w in zip(shape["input"], shape["window"], window, strict=True)
    ]
    found = {"input": size, "heads": 2, "head_dim": 8, "window": window}
    if "shift" in shape:
        found["shift"] = [w // 2 if s else 0 for s, w in zip(shape["shift"], window, strict=True)]
    return found
