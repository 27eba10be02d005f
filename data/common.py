"""Stands in for common/ where Python sees this folder alone: prepare.py was started by its path."""
raise SystemExit("start it in the project's folder: python -m data.prepare")
