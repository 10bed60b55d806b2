"""Options and sizes of transformer-w3l1.py and transformer-tp2.py. Imports no torch: `--help` reads them."""

SWEEPS = {
    "--batch-sizes": "sequences decoded together",
    "--input-length": "tokens of each prompt",
    "--output-lengths": "n1,n2: a step is (time of n2 tokens - time of n1) / (n2 - n1)",
}
PRESETS = {
    "quick": {"input_length": 16, "output_lengths": [2, 6], "batch_sizes": [1, 2], "repeats": 1},
    "laptop": {"input_length": 64, "output_lengths": [4, 20], "batch_sizes": [1, 4], "repeats": 3},
    "course": {"input_length": 128, "output_lengths": [16, 272], "batch_sizes": [1, 8, 32], "repeats": 5},
}
