#!/usr/bin/env python3
"""A stand-in for `nvidia-smi`, for test nodes without a GPU. It is NOT NVIDIA's tool.

It answers `--query-gpu=…` and `--query-compute-apps=…` in the CSV of the real one, from a small JSON file
(`gpu.json` in the folder above this program, or `$FAKE_NVIDIA_SMI_STATE`):

    {"driver": "550.54.15",
     "gpus": [{"index": 0, "uuid": "GPU-…", "name": "…", "memory_total": 40960, "memory_used": 3,
               "utilization": 0, "temperature": 31}],
     "processes": [{"pid": 4711, "gpu": 0, "name": "python3", "memory": 1024}],
     "error": null, "exit_code": 9, "delay": 0}

Memory is in MiB; a value of null prints as `[N/A]`. `error` makes every call print that text and end with
`exit_code`; `delay` holds every answer back by that many seconds, as a hanging driver does.
Standard library only, Python 3.8 or newer; imports nothing of this project.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

NOTICE = "This is a stand-in for nvidia-smi, made for tests. It is not NVIDIA's tool."
HELP = f"""{NOTICE}

    -L, --list-gpus
    --query-gpu=FIELD,…            index uuid name memory.total memory.used memory.free utilization.gpu
                                   temperature.gpu driver_version count timestamp pci.bus_id
    --query-compute-apps=FIELD,…   pid gpu_uuid gpu_name process_name used_memory timestamp
    --format=csv[,noheader][,nounits]
    -i, --id=INDEX|UUID            only this GPU
"""
State = Dict[str, Any]

# The field as it may be asked for -> the name the real tool prints in the header, and the unit.
GPU_FIELDS = {
    "index": ("index", ""),
    "uuid": ("uuid", ""),
    "gpu_uuid": ("uuid", ""),
    "name": ("name", ""),
    "gpu_name": ("name", ""),
    "memory.total": ("memory.total", "MiB"),
    "memory.used": ("memory.used", "MiB"),
    "memory.free": ("memory.free", "MiB"),
    "utilization.gpu": ("utilization.gpu", "%"),
    "temperature.gpu": ("temperature.gpu", ""),
    "driver_version": ("driver_version", ""),
    "count": ("count", ""),
    "timestamp": ("timestamp", ""),
    "pci.bus_id": ("pci.bus_id", ""),
    "gpu_bus_id": ("pci.bus_id", ""),
}
APP_FIELDS = {
    "pid": ("pid", ""),
    "gpu_uuid": ("gpu_uuid", ""),
    "gpu_name": ("gpu_name", ""),
    "process_name": ("process_name", ""),
    "name": ("process_name", ""),
    "used_memory": ("used_gpu_memory", "MiB"),
    "used_gpu_memory": ("used_gpu_memory", "MiB"),
    "timestamp": ("timestamp", ""),
}


def read_state() -> State:
    """The node's GPU values; an absent file is a node whose driver does not answer."""
    path = os.environ.get("FAKE_NVIDIA_SMI_STATE") or Path(__file__).absolute().parent.parent / "gpu.json"
    try:
        state = json.loads(Path(path).read_text())
    except FileNotFoundError:
        return {"error": f"Stand-in nvidia-smi: its values are missing ({path}).", "exit_code": 9}
    return dict(state)


def gpu_row(state: State, gpu: State) -> State:
    used, total = gpu.get("memory_used"), gpu.get("memory_total")
    return {
        "index": gpu["index"],
        "uuid": gpu["uuid"],
        "name": gpu["name"],
        "memory.total": total,
        "memory.used": used,
        "memory.free": None if used is None or total is None else total - used,
        "utilization.gpu": gpu.get("utilization"),
        "temperature.gpu": gpu.get("temperature"),
        "driver_version": state.get("driver"),
        "count": len(state["gpus"]),
        "timestamp": time.strftime("%Y/%m/%d %H:%M:%S.000"),
        "pci.bus_id": f"00000000:{gpu['index'] + 1:02X}:00.0",
    }


def app_row(gpu: State, process: State) -> State:
    return {
        "pid": process["pid"],
        "gpu_uuid": gpu["uuid"],
        "gpu_name": gpu["name"],
        "process_name": process.get("name", "python3"),
        "used_gpu_memory": process.get("memory"),
        "timestamp": time.strftime("%Y/%m/%d %H:%M:%S.000"),
    }


def query(fields: str, known: Dict[str, Any], rows: List[State], options: List[str]) -> int:
    """Print the rows as the real tool does: `, ` between cells, units unless `nounits`."""
    columns = []
    for field in (f.strip() for f in fields.split(",")):
        if field not in known:
            print(f'Field "{field}" is not a valid field to query.\n')
            return 2
        columns.append(known[field])
    if "csv" not in options:
        print('"--format=" switch is missing. Please run "nvidia-smi -h" for help.\n')
        return 2
    if "noheader" not in options:
        print(", ".join(f"{name} [{unit}]" if unit else name for name, unit in columns))
    for row in rows:
        cells = []
        for name, unit in columns:
            value = row[name]
            text = "[N/A]" if value is None else str(value)
            cells.append(f"{text} {unit}" if unit and value is not None and "nounits" not in options else text)
        print(", ".join(cells))
    return 0


def main(argv: List[str]) -> int:
    asked: Dict[str, str] = {}
    for word in argv:
        name, _, value = word.partition("=")
        asked[{"-i": "--id", "-L": "--list-gpus", "-h": "--help"}.get(name, name)] = value
    if "-i" in argv and argv.index("-i") + 1 < len(argv):  # "-i 0": the value is the next word
        asked["--id"] = argv[argv.index("-i") + 1]
        asked.pop(asked["--id"], None)
    if "--help" in asked:
        print(HELP)
        return 0

    state = read_state()
    time.sleep(state.get("delay") or 0)
    if state.get("error"):
        print(state["error"])
        return int(state.get("exit_code") or 9)
    if "--version" in asked:
        print(f"{NOTICE}\nDRIVER version      : {state.get('driver')} (made up)")
        return 0

    wanted: Optional[str] = asked.get("--id")
    gpus = [g for g in state["gpus"] if wanted is None or wanted in (str(g["index"]), g["uuid"])]
    if not gpus:
        print("No devices were found")
        return 6
    unknown = set(asked) - {"--id", "--list-gpus", "--query-gpu", "--query-compute-apps", "--format"}
    if unknown:
        print(f"Invalid combination of input arguments: {', '.join(sorted(unknown))}. Please run --help.")
        return 2
    options = [o.strip() for o in asked.get("--format", "").split(",")]
    if "--list-gpus" in asked:
        for gpu in gpus:
            print(f"GPU {gpu['index']}: {gpu['name']} (UUID: {gpu['uuid']})")
        return 0
    if "--query-gpu" in asked:
        return query(asked["--query-gpu"], GPU_FIELDS, [gpu_row(state, g) for g in gpus], options)
    if "--query-compute-apps" in asked:
        rows = [app_row(g, p) for g in gpus for p in state.get("processes", []) if p["gpu"] == g["index"]]
        return query(asked["--query-compute-apps"], APP_FIELDS, rows, options)

    print(NOTICE)
    for gpu in gpus:
        print(f"GPU {gpu['index']}  {gpu['name']}  {gpu.get('memory_used')}MiB / {gpu.get('memory_total')}MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
