"""A crash report: traceback, command and versions in one file, without secrets."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import traceback
from datetime import datetime
from pathlib import Path

from deft.core import files
from deft.core.errors import DiskError
from deft.core.redact import redacted
from deft.core.versions import installed as versions


def report(error: Exception, folder: Path) -> str:
    """Writes the traceback, the command and the versions to `folder`; one line for the user that names the file."""
    when = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    text = redacted(
        f"deft {when}\n{' '.join(sys.argv)}\n{platform.platform()}\n"
        + "".join(f"{name} {version}\n" for name, version in versions().items())
        + "\n"
        + "".join(traceback.format_exception(error))
    )
    rank = f"-rank{os.environ['RANK']}" if "RANK" in os.environ else ""
    what = redacted(f"{type(error).__name__}: {error}").partition("\n")[0]
    for place in (folder, Path(tempfile.gettempdir())):
        path = place / f"deft-crash-{when}{rank}.txt"
        try:
            files.write_text(path, text)
        except DiskError:
            continue
        return f"this is a bug in deft ({what}); {path} has what is needed to find it"
    return f"this is a bug in deft, and no report could be written\n{text}"
