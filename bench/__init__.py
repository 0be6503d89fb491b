"""Every performance claim, against its peers, in one run."""
