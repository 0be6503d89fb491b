"""Read what happened: find a run, sum it up, show it while it goes on, report on it. No torch."""
