"""What a run does: training, inference, checkpoints, deployment, evaluation, its folder."""
