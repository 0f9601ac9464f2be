"""How a round's data is made, kept and judged: plain functions over files, and the command line."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("oapl")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"
