"""What attention runs in: the catalogue of models, the adapter to Diffusers, generation, the embedded model."""
