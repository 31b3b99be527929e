"""Full-size models without a download: attention structure planted in an untrained transformer. Never for fidelity."""
