"""What is run and how it is timed: pytest benchmarks, timer, telemetry, and the record they leave."""
