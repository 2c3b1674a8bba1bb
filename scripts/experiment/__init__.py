"""The experiment: runs and their measurement, results, statistics, figures, report."""
