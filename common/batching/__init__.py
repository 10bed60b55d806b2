"""What the schedulers of assignment 4 run in and are measured by: request sets, the loop, metrics, peers, files."""
