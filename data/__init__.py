import common  # noqa: F401 (first: see common/__init__.py)
