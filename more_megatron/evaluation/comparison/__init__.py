"""The comparison of systems at equal cost: matching, runs, measures, report."""
