"""How a round's data is made, kept and judged: plain functions over files, and the command line."""
