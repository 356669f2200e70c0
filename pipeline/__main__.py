"""``python -m onnxsmith.pipeline``: the command line, where its script is not on the path."""

import os
import signal
import threading

from onnxsmith.pipeline.batch_worker import END_WITH_STDIN
from onnxsmith.pipeline.cli import main


def _end_with_parent() -> None:
    """Interrupts this process when whoever holds the other end of standard input is gone, even by SIGKILL."""
    # Not through sys.stdin, whose lock would then be held when the interpreter ends.
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    if os.environ.pop(END_WITH_STDIN, ""):
        threading.Thread(target=_end_with_parent, daemon=True).start()
    main()
