"""Stands in for common/ where Python sees this folder alone: a script was started by its path."""
import sys
from pathlib import Path

script = Path(sys.argv[0]).stem
raise SystemExit(f"start it in the project's folder: python -m experiments.{script}")
