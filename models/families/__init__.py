"""What the adapter knows of each family of models: one file a family, with its models."""
