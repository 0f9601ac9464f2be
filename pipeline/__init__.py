"""How a round's data is made, kept and judged: plain functions over files, and the command line."""


def __getattr__(name: str) -> str:
    """`__version__`, looked up when it is asked for: reading the metadata is a good part of `oapl --help`."""
    if name != "__version__":
        raise AttributeError(name)
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("oapl")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "0+unknown"
