"""Prints pip constraints: the lower bound of every requirement of the base installation and of the extras given."""

import configparser
import re
import sys
from pathlib import Path

setup = configparser.ConfigParser()
setup.read(Path(__file__).parents[1] / "setup.cfg")
texts = [setup["options"]["install_requires"], *(setup["options.extras_require"][extra] for extra in sys.argv[1:])]
lines = {line for line in "\n".join(texts).splitlines() if line and not line.startswith("#")}
without = [line for line in lines if not re.fullmatch(r"[\w-]+>=[\w.]+", line)]
if without:
    sys.exit(f"setup.cfg: give {', '.join(sorted(without))} a lower bound and no other, as in NAME>=VERSION")
print("\n".join(sorted(line.replace(">=", "==") for line in lines)))
