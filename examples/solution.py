"""A small job for a first try: says where it runs, computes something, hands in two records.

What a job prints is kept as it is. What it writes to `$RESULTS_FILE`, one JSON object a line, is its result.
"""

import json
import os
import platform
import time


def sum_of_squares(n: int) -> int:
    return sum(i * i for i in range(n))


def main() -> None:
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    print(f"job {os.environ.get('JOB_ID', '(none)')} for {os.environ.get('USER_ID', '(nobody)')}", flush=True)
    print(f"Python {platform.python_version()}, CUDA_VISIBLE_DEVICES={gpus!r}", flush=True)

    records = []
    for n in (1_000, 1_000_000):
        began = time.perf_counter()
        value = sum_of_squares(n)
        records.append({"n": n, "sum_of_squares": value, "seconds": round(time.perf_counter() - began, 6)})
        print(f"the squares below {n:,} add up to {value:,}", flush=True)

    with open(os.environ.get("RESULTS_FILE", "results.jsonl"), "w", encoding="utf-8") as results:
        for record in records:
            results.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
