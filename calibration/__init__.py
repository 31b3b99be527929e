"""The offline part: what a method learns from dense videos, whatever the method, and the files that hold it."""
