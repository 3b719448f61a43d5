"""When, on what and with what something was measured: no paths, no host names."""

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path


def provenance(script):
    """Facts for a line of the history; ``script`` is the file name of the benchmark."""
    here, info = Path(__file__).parent, Path("/proc/cpuinfo")
    # "+": the code that was measured differs from the commit; the history, which each run lengthens, does not count.
    asked = (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "../src", script, "provenance.py"])
    commit, changes = (subprocess.run(["git", *words], cwd=here, capture_output=True, text=True).stdout for words in asked)
    cpu = info.read_text().partition("model name\t: ")[2].partition("\n")[0] if info.exists() else platform.processor()
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers", "groundup")}
    line = {"date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()), "commit": commit.strip() + "+" * bool(changes)}
    return line | {"versions": versions | {"python": platform.python_version()}, "cpu": cpu, "cores": os.cpu_count()}
