"""The suites: what is measured and how, one file each."""
