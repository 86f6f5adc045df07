"""Where mergekit is installed, and the script that runs it there."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.paths import ROOT

RUN = ROOT / "tests" / "support" / "mergekit" / "run.py"
"""The script that runs mergekit, in its own environment."""
MERGEKIT = Path(os.environ.get("MERGEKIT_ENV", ROOT / ".venv-mergekit")).absolute()
