"""Reports: read records and summaries, nothing else."""
