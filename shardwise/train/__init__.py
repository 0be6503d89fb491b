"""One job on one mesh: from the job's source to a trained, checkpointed model."""
