"""Around finished runs: sweeps, attacks, figures, planted memory, and what makes a results page."""
