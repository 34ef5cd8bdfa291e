"""The parallelism study: cells, figures, tables and plots, and what came out."""
