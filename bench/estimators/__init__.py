"""Estimators of the reverse KL's gradient: what each is off by and how noisy it is, on rows of a real student and teacher.

`formulas.py` has the estimators, one formula each. `statistics.py` has what is summed over rows, `rollouts.py` the pairs of
models and their on-policy samples, `study.py` the measurement, `figure.py` the drawing of its reports.
"""
