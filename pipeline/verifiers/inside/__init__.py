"""What runs inside a sandbox. `sandbox.py` reads these files, compiles them and sends them in, in the order of PARTS.

There they share one namespace, that of the first process, whose Python starts without its library on the path of
imports. So they import only what is built in; what they import from each other stands under `if False`, for readers
and type checkers. Nothing in here is a secret, and nothing that comes out of a sandbox is believed: whoever reads its
frames treats them as the candidate's own words.
"""

PARTS = ("wire", "work", "nest", "first")
"""Each may use those before it. `values` goes with them as code that is run where it is needed."""
