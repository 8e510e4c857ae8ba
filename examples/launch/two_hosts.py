"""Two hosts on one machine, as network namespaces, and one is lost. As root: python examples/launch/two_hosts.py FOLDER

Each namespace has an address of its own and runs `deft launch` with one rank. The second host is killed whole, is
started again, and what is exported is compared, byte by byte, with a run of one rank.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOSTS = ("10.77.0.1", "10.77.0.2")
SPACES = [f"deft-{os.getpid()}-{number}" for number in (0, 1)]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def hosts() -> Iterator[None]:
    """Two namespaces, joined by a cable."""
    try:
        for space in SPACES:
            ip("netns", "add", space)
        ends = [word for space in SPACES for word in ("name", "cable", "netns", space)]
        ip("link", "add", *ends[:4], "type", "veth", "peer", *ends[4:])
        for space, address in zip(SPACES, HOSTS, strict=True):
            for words in (["addr", "add", f"{address}/24", "dev", "cable"], ["link", "set", "cable", "up"]):
                ip("-n", space, *words)
            ip("-n", space, "link", "set", "lo", "up")
        yield
    finally:
        for space in SPACES:
            subprocess.run(["ip", "netns", "del", space], check=False)


def start(number: int, folder: Path) -> subprocess.Popen[bytes]:
    """`deft launch` on a host; what it says is added to host-N.txt."""
    words = ["--nnodes", "2", "--ranks", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{HOSTS[0]}:29500"]
    words += [
        "--rdzv-conf",
        f"is_host={1 - number}",
        "--rdzv-id",
        "two-hosts",
        "--local-addr",
        HOSTS[number],
        "--max-restarts",
        "3",
        "train",
        "run.yaml",
    ]
    command = ["ip", "netns", "exec", SPACES[number], sys.executable, "-m", "deft", "launch", *words]
    own = {"GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    with (folder / f"host-{number}.txt").open("ab") as said:
        return subprocess.Popen(
            command, cwd=folder, env={**os.environ, **own}, stdout=said, stderr=said, start_new_session=True
        )


def prepare(folder: Path) -> None:
    """A tiny model, rows, run.yaml, and the run of one rank to compare with, in `alone`."""
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
    from tiny_models import write_llama
    from tiny_tokenizers import CHATML

    from deft.run import config
    from deft.run.train import train

    write_llama(folder / "model", chat_template=CHATML)
    turns = [[("user", f"What is {number} + 2?"), ("assistant", f"It is {number + 2}.")] for number in range(48)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"model": str(folder / "model"), "data": str(folder / "train.jsonl"), "output": str(folder / "run")}
    more = {"epochs": 4, "batch__examples": 6, "microbatch_tokens": 128, "lanes": 2, "device": "cpu"}
    made = config.make(config.nested({**asked, **more, "checkpoint__every": 5}))
    (folder / "run.yaml").write_text(config.as_yaml(made))
    train(made.model_copy(update={"output": str(folder / "alone")}))


def main(folder: Path) -> None:
    """Prepares, runs on both hosts, loses the second after step 10, starts it again, and compares."""
    folder.mkdir(parents=True)
    prepare(folder)
    with hosts():
        both = [start(number, folder) for number in (0, 1)]
        while not (folder / "run" / "checkpoints" / "step-000010").is_dir():
            assert all(each.poll() is None for each in both), "a host ended before step 10: see host-N.txt"
            time.sleep(0.05)
        children = subprocess.run(["ip", "netns", "pids", SPACES[1]], capture_output=True, text=True, check=True)
        for pid in map(int, children.stdout.split()):
            os.kill(pid, signal.SIGKILL)
        both[1].wait()
        print("the second host is lost after step 10; it is started again")
        both[1] = start(1, folder)
        codes = [each.wait() for each in both]
    last = [(folder / name / "final" / "model.safetensors").read_bytes() for name in ("alone", "run")]
    print(f"exit codes {codes}; the export has {'the' if last[0] == last[1] else 'NOT the'} bytes of one rank")
    sys.exit(0 if codes == [0, 0] and last[0] == last[1] else 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
