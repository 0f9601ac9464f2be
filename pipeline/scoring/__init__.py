"""A round's verdicts: rollouts joined to their references, judged, and kept beside them."""
