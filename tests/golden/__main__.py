"""Write the golden files: `python -m tests.golden write`, after a change that is meant to alter results."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.golden import golden


def main() -> None:
    if sys.argv[1:] != ["write"]:
        raise SystemExit(__doc__)
    golden.save(golden.FINGERPRINTS, {name: golden.fingerprints(name) for name in golden.readable()})
    with TemporaryDirectory() as folder:
        golden.save(golden.RESULTS, golden.results(Path(folder)))


main()
