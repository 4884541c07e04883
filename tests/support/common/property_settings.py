"""How the property tests run. A module of its own: hypothesis need not be installed where the rest of the tests run."""

from __future__ import annotations

import hypothesis

# Derandomised: the same examples on every run, so that a red test is the change's fault.
PROPERTY = hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
