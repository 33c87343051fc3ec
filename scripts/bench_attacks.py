"""How long a stream waits for its next tokens while strangers send the worst they can.

    python scripts/bench_attacks.py --model smollm2-135m

A server of its own is started. For each attack (tests/support/attacks.py) the longest gap in one stream is measured, in
milliseconds of the clock, beside the longest on the idle server just before; it exits with 1 if any is beyond --most.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from attacks import attacks, longest_wait  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=1500, help="of each stream; the next begins when one ends")
    parser.add_argument("--rounds", type=int, default=1, help="the shortest of so many is told")
    parser.add_argument("--most", type=float, default=300, help="milliseconds that an attack may add")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "tinyserve", "serve", arguments.model, "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    worst = 0.0
    try:
        lines = iter(server.stderr.readline, "")
        port = int(next(filter(None, (re.search(r"^http://127\.0\.0\.1:(\d+) ", line) for line in lines)))[1])
        subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
        print(f"{'beside':36}{'idle, ms':>10}{'attack, ms':>12}")
        for name, attack in attacks().items():
            found = [longest_wait(port, attack, time.perf_counter, arguments.tokens) for _ in range(arguments.rounds)]
            idle, beside = min(found, key=lambda pair: pair[1])
            worst = max(worst, 1e3 * (beside - idle))
            print(f"{name:36}{1e3 * idle:10.0f}{1e3 * beside:12.0f}", flush=True)
    finally:
        server.terminate()
        server.wait(60)
    print(f"the most that an attack adds: {worst:.0f} ms")
    return 1 if worst > arguments.most else 0


if __name__ == "__main__":
    sys.exit(main())
