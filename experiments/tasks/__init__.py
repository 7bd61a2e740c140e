"""What is learned: a module for each kind of data, from end to end.

A further one, somebody's own data, needs four things; the rest is that of every task:

    settings     a frozen dataclass with the fields of `setup.config.Run`, `setup.settings`
                 .TrainConfig as `train`, and its own; `setup.command.read` makes options of them
    problem      a network, the training data and a likelihood: `pipeline.inference.Problem`
    evaluation   what is certified of the deployed samples
    run          `with open_folder(...) as folder`: `train`, `refine`, `deploy`, the evaluation,
                 `write_json`

`tests/experiments/test_own_data.py` is one in 60 lines, with its command line and `--resume`.
"""
