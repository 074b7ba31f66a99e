"""Claim: `mftmerge --help` answers within 0.3 s and imports neither torch nor numpy.

Interleaved with a bare interpreter and with `import torch`, whole processes, medians. `--quick` does fewer rounds.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys

from common import interleaved, machine, write

COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "help": [sys.executable, "-c", "from mftmerge.cli import main; main(['--help'])"],
    "inspect_help": [sys.executable, "-c", "from mftmerge.cli import main; main(['inspect', '--help'])"],
    "import_torch": [sys.executable, "-c", "import torch"],
}


def main() -> None:
    rounds = 3 if "--quick" in sys.argv else 11
    run = functools.partial(subprocess.run, check=True, capture_output=True)
    seconds = interleaved({name: functools.partial(run, command) for name, command in COMMANDS.items()}, rounds)
    medians = {name: round(value, 4) for name, value in seconds.items()}
    result = {
        "medians_s": medians,
        "target_s": 0.3,
        "met": medians["help"] <= 0.3,
        "help_over_bare_interpreter": round(medians["help"] / medians["python"], 2),
        "import_torch_over_help": round(medians["import_torch"] / medians["help"], 2),
        "rounds": rounds,
        **machine(),
    }
    print(json.dumps(result, indent=1))
    if "--quick" not in sys.argv:
        write("startup", result)


if __name__ == "__main__":
    main()
