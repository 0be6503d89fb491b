"""Make a module obey a plan: replicas, the reducer of the data axis, exact sums, one training step."""
