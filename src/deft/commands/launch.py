"""`deft launch`: torchrun with deft's exit codes. Options before the verb are torchrun's own."""

from __future__ import annotations

import os
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from deft.core.errors import InputError, LostProcessError
from deft.core.signals import EXIT_CODE


def run(arguments: Sequence[str]) -> int:
    """Starts the ranks of this machine and waits for them; the exit code of the one that ended the run.

    One that was killed counts as lost. Where this process gets a signal it is passed on to all, and they save.
    """
    given = parsed(arguments)
    ranks = torchrun.determine_local_world_size(given.nproc_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))  # torchrun says 1
    if given.nnodes not in ("1", "1:1"):
        # A machine that is started again never learns the address of a store that is kept (seen with torch 2.13).
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    try:
        torchrun.run(given)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        sys.stderr.write(f"deft: rank {rank} was ended by {signal.Signals(-failure.exitcode).name}\n")
        return LostProcessError.exit_code
    except SignalException:
        return EXIT_CODE
    return 0


def parsed(arguments: Sequence[str]) -> Namespace:
    """What torchrun is to do. Raises InputError for a command that is not one of several ranks.

    >>> given = parsed(["--ranks", "2", "--max-restarts", "1", "train", "run.yaml", "epochs=2"])
    >>> given.nproc_per_node, given.max_restarts, given.module, given.training_script, given.training_script_args
    ('2', 1, True, 'deft', ['train', 'run.yaml', 'epochs=2'])
    """
    parser = torchrun.get_args_parser()
    parser.prog = "deft launch"
    parser.add_argument("--ranks", dest="nproc_per_node", metavar="N", help="the same as --nproc-per-node")
    parser.set_defaults(signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    given = parser.parse_args([*arguments])
    if given.training_script != "train":
        raise InputError(
            f"launch: {given.training_script!r} is no command of several ranks; write deft launch ... train"
        )
    given.module, given.training_script_args = True, ["train", *given.training_script_args]
    given.training_script = "deft"
    return given
