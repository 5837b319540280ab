"""The programs in benchmarks/gpu are imported from the checkout, as `python -m` finds them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
