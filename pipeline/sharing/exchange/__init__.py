"""Rollouts in the columns of other projects, in and out: a module a form, listed in `forms`.

Where token ids are there they are kept; where only text is there it is tokenised again, which is recorded in the
manifest and said on the card, and log-probabilities are null: they are recomputed before learning.
"""
