"""Command lines: training, watching, and the experiment."""
