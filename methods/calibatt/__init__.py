"""CalibAtt: what it learns, and the plans that follow (arXiv 2603.05503)."""
