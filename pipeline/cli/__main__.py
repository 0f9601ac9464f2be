"""`python -m pipeline.cli`: the same as `oapl`."""

from pipeline.cli.main import main

main()
