"""Regressions from end to end, robust training beside plain.

    python -m experiments.regression {diabetes,sine} [--inference NAME] [--seed N] [--out DIR] ...

writes one new folder (`experiments.tasks.regression` says what is in it).
"""

from experiments.tasks.regression.run import main

if __name__ == "__main__":
    raise SystemExit(main())
