"""One page about a finished run: what it classifies, what the attack breaks, what is proved.

python -m experiments.report RUN             # writes RUN/report.html
python -m experiments.report RUN --summary summary.png
"""
