"""Everything that runs: training, evaluation, comparison, and the command line."""
