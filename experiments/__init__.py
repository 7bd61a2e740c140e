"""Everything that reads files, saves, prints, plots or parses arguments: commands over four wings.

    run  certify  attack  report  regression      the commands: python -m experiments.NAME, or
                                                  bnncert NAME (a wheel has them in bnncert)
    setup     what a run is                       pipeline  what it does
    report    what is shown of it                 tasks     images, regressions: what is learned

Imports go from a wing to those before it. `studies` and `benchmarks` stand on all of them.
"""
