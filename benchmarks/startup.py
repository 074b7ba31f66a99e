"""Claim: `mftmerge --help` answers within 0.3 s and imports neither torch nor numpy; nor does Tab wait for them.

Interleaved with a bare interpreter and with `import torch`: processor time of whole processes, which other programs on
the machine do not lengthen, medians. `--quick` does fewer rounds.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import subprocess
import sys

from common import interleaved, machine, write

PROGRAM = [sys.executable, "-c", "from mftmerge.cli import main; main()"]
WAYS: dict[str, list[str]] = {
    "python": [sys.executable, "-c", "pass"],
    "import_mftmerge": [sys.executable, "-c", "import mftmerge"],
    "help": [*PROGRAM, "--help"],
    "inspect_help": [*PROGRAM, "inspect", "--help"],
    "complete_command": PROGRAM,
    "complete_operation": PROGRAM,
    "import_torch": [sys.executable, "-c", "import torch"],
}
TYPED = {"complete_command": "mftmerge co", "complete_operation": "mftmerge combine --op v"}


def start(name: str) -> None:
    environment = dict(os.environ)
    if typed := TYPED.get(name):
        position = str(len(typed.split()) - 1)
        environment |= {"_MFTMERGE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": position}
    subprocess.run(WAYS[name], check=True, capture_output=True, env=environment)


def processor_time() -> float:
    """Seconds that finished child processes have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    rounds = 3 if "--quick" in sys.argv else 11
    seconds = interleaved({name: functools.partial(start, name) for name in WAYS}, rounds, clock=processor_time)
    medians = {name: round(value, 4) for name, value in seconds.items()}
    result = {
        "medians_s": medians,
        "target_s": 0.3,
        "met": medians["help"] <= 0.3,
        "over_bare_interpreter": {n: round(v / medians["python"], 2) for n, v in medians.items()},
        "import_torch_over": {n: round(medians["import_torch"] / v, 1) for n, v in medians.items()},
        "rounds": rounds,
        **machine(),
    }
    print(json.dumps(result, indent=1))
    if "--quick" not in sys.argv:
        write("startup", result)


if __name__ == "__main__":
    main()
