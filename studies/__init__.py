"""Around finished runs: sweeps, attacks, figures."""
