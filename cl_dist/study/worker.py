"""Worker process of a study: reads run configurations from stdin, computes them and writes a reply for each to stdout.

It stops when stdin closes, which also happens when the driver is killed: a run at work then saves its state as after
SIGTERM.
"""

import json
import logging
import os
import queue
import signal
import sys
import threading

from cl_dist import session
from cl_dist.errors import ClDistError, StoppedError
from cl_dist.run_config import parse_run
from cl_dist.stopping import stop_on_signals


def main() -> None:
    """Compute runs until stdin closes."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf8")
    os.dup2(2, 1)  # libraries print to stdout
    logging.getLogger("cl_dist").setLevel(logging.INFO)
    stop_on_signals()
    requests: queue.Queue[str | None] = queue.Queue()
    busy, ended = threading.Event(), threading.Event()

    def read() -> None:
        for line in sys.stdin:
            requests.put(line)
        ended.set()
        requests.put(None)
        if busy.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=read, daemon=True).start()
    while (line := requests.get()) is not None:
        busy.set()
        if ended.is_set():
            return
        request = json.loads(line)
        try:
            session.train(parse_run(request["config"]), baselines=False, command=request["command"])
            reply = {}
        except StoppedError:
            return
        except Exception as error:
            code = error.exit_code if isinstance(error, ClDistError) else 1
            logging.getLogger("cl_dist").exception("a run failed")
            reply = {"kind": type(error).__name__, "message": str(error), "code": code}
        busy.clear()
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
