"""`python -m experiments.regression`: see `experiments.regression.run`."""

from experiments.regression.run import main

if __name__ == "__main__":
    raise SystemExit(main())
