"""Claim: `mftmerge --help` answers within 0.3 s and imports neither torch nor numpy.

Interleaved with a bare interpreter and with `import torch`, whole processes, medians. `--quick` does fewer rounds.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "help": [sys.executable, "-c", "from mftmerge.cli import main; main(['--help'])"],
    "inspect_help": [sys.executable, "-c", "from mftmerge.cli import main; main(['inspect', '--help'])"],
    "import_torch": [sys.executable, "-c", "import torch"],
}


def main() -> None:
    rounds = 3 if "--quick" in sys.argv else 11
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for round_ in range(rounds + 1):
        for name, command in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            if round_:  # the first round warms the disk cache
                seconds[name].append(time.perf_counter() - started)
    medians = {name: round(statistics.median(values), 4) for name, values in seconds.items()}
    result = {
        "medians_s": medians,
        "target_s": 0.3,
        "met": medians["help"] <= 0.3,
        "help_over_bare_interpreter": round(medians["help"] / medians["python"], 2),
        "import_torch_over_help": round(medians["import_torch"] / medians["help"], 2),
        "rounds": rounds,
        "python": platform.python_version(),
    }
    print(json.dumps(result, indent=1))
    if "--quick" not in sys.argv:
        out = Path(__file__).parent / "results" / "startup.json"
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
