"""Choose a Plan for a ModelProfile on a Cluster, say why, and refuse what cannot run. No torch."""
