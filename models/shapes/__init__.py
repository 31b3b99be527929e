"""A small text-to-video model that ships with the package: a Wan transformer trained on moving shapes."""
