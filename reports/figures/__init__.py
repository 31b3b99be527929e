"""Figures of a report: one file each, all of them in `catalogue.FIGURES`."""
